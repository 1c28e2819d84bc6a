"""python -m datasetdm_fast.serve: a service that answers prompts with images and labels over HTTP."""

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_lines, print_result
from datasetdm_fast.engine.engines import check_sources
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.gallery.server import hosts_of
from datasetdm_fast.settings import CommandSettings, EngineSettings, ModelSettings, setting

if TYPE_CHECKING:
    from datasetdm_fast.service.batching import Batcher

EXAMPLES = ("--port 8000", "--model MODEL --decoder DIR --wait 50")
TOKEN = "DATASETDM_TOKEN"
LOCAL = ("127.0.0.1", "localhost", "::1")
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


@command_with(ServeConfig, EXAMPLES)
def main(config: ServeConfig, command: CommandLine) -> int:
    token, is_local, is_ipv6 = os.environ.get(TOKEN, ""), config.host in LOCAL, ":" in config.host
    if not token and not is_local:
        raise Refused(f"--host {config.host}: others may connect, and {TOKEN} holds no token", f"Set {TOKEN}.")
    check_sources(config.model, config.decoder, config.allow_download)
    try:
        import uvicorn

        from datasetdm_fast.service.app import Service, TimedProtocol
    except ImportError as error:
        raise Missing(f"serve: {error}", "Install it with: pip install 'datasetdm-fast[serve]'") from error
    try:
        listening = socket.create_server(
            (config.host, config.port),
            family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
            backlog=MOST_CONNECTIONS,
            dualstack_ipv6=is_ipv6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        cause = f"--host {config.host} --port {config.port}: {error.strerror or error}"
        raise Refused(cause, "Choose another address.") from error
    with listening, open_batcher(config) as batcher:
        port, pipeline = listening.getsockname()[1], batcher.pipeline
        app = Service(batcher, config.most_steps).app(() if token else hosts_of(port), token)
        options = {"log_level": "critical", "access_log": False, "limit_concurrency": MOST_CONNECTIONS}
        server = uvicorn.Server(uvicorn.Config(app, http=TimedProtocol, lifespan="off", ws="none", **options))
        address = f"http://{f'[{config.host}]' if is_ipv6 else config.host}:{port}"
        print_result(config, {"address": address, "batch_size": batcher.size, "labels": pipeline.tasks}, address)
        print_lines(config, f"{pipeline.engine.model.name}, batches of {batcher.size}; Ctrl-C ends the service")
        with ThreadPoolExecutor(1, "http") as thread:  # so that signals stay ours; what was asked is still answered
            try:
                thread.submit(server.run, [listening]).result()
            except (KeyboardInterrupt, SystemExit) as stop:
                return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
            finally:
                server.should_exit = True
    return 0


def open_batcher(config: ServeConfig) -> "Batcher":
    from datasetdm_fast.engine.pipeline import Pipeline
    from datasetdm_fast.service.batching import Batcher

    model = {flag.name: getattr(config, flag.name) for flag in fields(ModelSettings) if flag.name != "model"}
    pipeline = Pipeline.from_pretrained(config.model, **model, **config.engine_choices())
    size = config.batch_size or pipeline.engine.suggested_batch()
    return Batcher(pipeline, size, config.wait / 1000, config.queue)


def build(arguments: dict[str, Any]) -> Any:
    """The deployment for Ray Serve that docs/serve.yaml names; `arguments` are settings of this command."""
    from ray import serve

    config = ServeConfig(**arguments)

    def build_replica() -> Any:
        from datasetdm_fast.service.app import Service

        if not (token := os.environ.get(TOKEN)):
            raise Refused(f"{TOKEN} holds no token", "Set it under runtime_env of the application.")
        return Service(open_batcher(config).__enter__(), config.most_steps).app([], token)

    return serve.deployment(serve.ingress(build_replica)(), name="service").bind()


if __name__ == "__main__":
    sys.exit(main())
