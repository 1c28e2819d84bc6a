"""python -m datasetdm_fast.serve: a service that answers prompts with images and labels over HTTP."""

import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_lines, print_result
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.settings import CommandSettings, EngineSettings, ModelSettings, setting

PROG = "python -m datasetdm_fast.serve"
EXAMPLES = ("--port 8000", "--model MODEL --decoder DIR --wait 50")
TOKEN = "DATASETDM_TOKEN"
MOST_CONNECTIONS = 1000


@dataclass(frozen=True)
class ServeConfig(ModelSettings, EngineSettings, CommandSettings):
    host: str = setting(
        "127.0.0.1", f"address to listen on; any other than this machine's own needs a token in {TOKEN}", metavar="HOST"
    )
    port: int = setting(8000, "port to listen on, 0 = any that is free", metavar="N", least=0, most=65535)
    batch_size: int = setting(0, "images made at once at most, 0 = what suits the engine", metavar="N", least=0)
    wait: float = setting(20.0, "milliseconds that a batch waits for more requests", metavar="MS", least=0, most=60_000)
    queue: int = setting(
        64, "images that wait at most; who asks for more is told when to ask again", metavar="N", least=1
    )
    most_steps: int = setting(250, "sampling steps of a request at most", metavar="N", least=1)
    json: bool = setting(False, "machine-readable result on stdout")
    quiet: bool = setting(False, "print only the address")


@command
def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, ServeConfig, PROG, __doc__, EXAMPLES)
    token, is_local = os.environ.get(TOKEN, ""), config.host in ("127.0.0.1", "localhost", "::1")
    if not token and not is_local:
        raise Refused(f"--host {config.host}: others may connect, and {TOKEN} holds no token", f"Set {TOKEN}.")
    try:
        import uvicorn

        from datasetdm_fast.service.app import Service, TimedProtocol
    except ImportError as error:
        raise Missing(f"serve: {error}", "Install it with: pip install 'datasetdm-fast[serve]'") from error
    from datasetdm_fast.engine.pipeline import Pipeline
    from datasetdm_fast.service.batching import Batcher

    with closing(_listen(config.host, config.port)) as listening:
        port = listening.getsockname()[1]
        pipeline = Pipeline.from_pretrained(
            config.model,
            decoder=config.decoder,
            size=config.size,
            lora=config.lora,
            allow_download=config.allow_download,
            outlines=config.outlines,
            **config.engine_choices(),
        )
        size = config.batch_size or pipeline.engine.suggested_batch()
        hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")] if is_local and not token else []
        with Batcher(pipeline, size, config.wait / 1000, config.queue) as batcher:
            app = Service(batcher, config.most_steps).app(hosts, token)
            options = {"log_level": "critical", "access_log": False, "limit_concurrency": MOST_CONNECTIONS}
            server = uvicorn.Server(uvicorn.Config(app, http=TimedProtocol, lifespan="off", ws="none", **options))
            address = f"http://{config.host}:{port}"
            print_result(config, {"address": address, "batch_size": size, "labels": pipeline.tasks}, address)
            print_lines(config, f"{pipeline.engine.model.name}, batches of {size}; Ctrl-C ends the service")
            return _serve(server, listening)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except OSError as error:
        raise Refused(f"--host {host} --port {port}: {error.strerror or error}", "Choose another address.") from error


def _serve(server: "uvicorn.Server", listening: socket.socket) -> int:  # noqa: F821
    """Serves until a signal comes, and answers what was asked before it; in a thread, so that signals stay ours."""
    code = 0
    with ThreadPoolExecutor(1, "http") as thread:
        serving = thread.submit(server.run, [listening])
        try:
            serving.result()
        except KeyboardInterrupt:
            code = 130
        except SystemExit as stop:
            code = int(stop.code or 0)
        server.should_exit = True
    return code


if __name__ == "__main__":
    sys.exit(main())
