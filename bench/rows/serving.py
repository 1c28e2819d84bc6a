"""python -m bench serving: images a second of the service under many clients, compared with generate, in turn; every
answer is compared with the image of its prompt and seed.
"""

import base64
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.machine.machine import describe
from datasetdm_fast import Pipeline
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.settings import setting

FAR = 8.0  # mean difference of two images in levels of 255: rounding is far below, another seed far above
LABELS = ("semantic", "instance", "depth", "pose")
MOST_GENERATED = 256  # images of a round of generate, whose rate does not depend on their number


@dataclass(frozen=True)
class ServingConfig:
    model: str = setting("demo", "model that is served", metavar="MODEL")
    clients: int = setting(16, "clients that ask at once", metavar="N", least=1)
    number: int = setting(128, "images of a round", metavar="N", least=1)
    rounds: int = setting(3, "rounds of the service and of generate, in turn", metavar="N", least=1)
    different: int = setting(32, "prompts, each with a seed of its own", metavar="N", least=1)
    steps: int = setting(50, "sampling steps", metavar="N", least=1)
    batch_size: int = setting(8, "images of a batch", metavar="N", least=1)
    labels: tuple[str, ...] = setting(LABELS, "labels of each image", metavar="LIST")


@contextmanager
def running(config: ServingConfig) -> Iterator[str]:
    """The address of a service of its own process."""
    flags = ["--model", config.model, "--port", "0", "--batch-size", str(config.batch_size), "--quiet"]
    line = [sys.executable, "-m", "datasetdm_fast.serve", *flags]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def client_of(address: str) -> Callable[[dict[str, Any]], str]:
    """Sends a request and gives the image in base64: by OpenAI's library where it is installed."""
    if importlib.util.find_spec("openai"):
        import openai

        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask(body: dict[str, Any]) -> str:
            extra = {name: value for name, value in body.items() if name != "prompt"}
            return client.images.generate(prompt=body["prompt"], extra_body=extra).data[0].b64_json

        return ask

    def ask_plainly(body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/images/generations", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["data"][0]["b64_json"]

    return ask_plainly


def measure(config: ServingConfig) -> dict[str, Any]:
    """Medians of both in images a second, their ratio, latencies, and answers that were lost or are another image's."""
    prompts = [world.view(k).caption for k in range(config.different)]
    pipeline = Pipeline.from_pretrained(config.model)
    batch = {"batch_size": config.batch_size, "steps": config.steps}
    expected = pipeline(prompts, seed=1, tasks=(), **batch).images
    device = pipeline.engine.device
    del pipeline
    bodies = [
        {"prompt": prompt, "seed": 1 + k, "steps": config.steps, "labels": list(config.labels)}
        for k, prompt in enumerate(prompts)
    ]
    seconds: list[float] = []
    ends: Counter[str] = Counter()
    rates: dict[str, list[float]] = {"generate": [], "service": []}
    with running(config) as address, tempfile.TemporaryDirectory() as folder:
        ask = client_of(address)

        def end_of(k: int) -> str:
            """Whether the answer is lost or another's."""
            begin = time.monotonic()
            try:
                picture = ask(bodies[k % config.different])
            except Exception:
                return "lost"
            seconds.append(time.monotonic() - begin)
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))), np.float32)
            return "swapped" if float(np.abs(image - expected[k % config.different]).mean()) > FAR else "right"

        end_of(0)
        seconds.clear()  # of an answer that does not count
        for turn in range(config.rounds):
            rates["generate"].append(generate_rate(config, Path(folder) / str(turn)))
            begin = time.monotonic()
            with ThreadPoolExecutor(config.clients) as pool:
                ends.update(pool.map(end_of, range(config.number)))
            rates["service"].append(config.number / (time.monotonic() - begin))
            told = {name: each[-1] for name, each in rates.items()} | ends
            print(json.dumps({**told, "seconds_p99": np.percentile(seconds, 99)}), file=sys.stderr)
    lost, swapped = ends["lost"], ends["swapped"]
    if lost or swapped:
        raise GateFailed(f"serving: {lost} answers are lost, {swapped} are another image's", "nothing was timed")
    medians = {name: round(statistics.median(each), 3) for name, each in rates.items()}
    last = np.percentile(seconds, (50, 99)).round(3).tolist()
    return {
        "machine": describe(device),
        **{"clients": config.clients, "answers": len(seconds), "lost": lost, "swapped": swapped},
        **{"images_per_second": medians, "ratio": round(medians["service"] / medians["generate"], 3)},
        **{"rounds": {name: [round(rate, 3) for rate in each] for name, each in rates.items()}},
        **{"seconds_median": last[0], "seconds_p99": last[1]},
    }


def generate_rate(config: ServingConfig, out: Path) -> float:
    """Images a second of a run of generate, without its start."""
    number = {
        "--number": min(config.number, MOST_GENERATED),
        "--steps": config.steps,
        "--batch-size": config.batch_size,
    }
    flags = [str(part) for pair in {**number, "--model": config.model, "--out": out}.items() for part in pair]
    line = [sys.executable, "-m", "datasetdm_fast.generate", *flags, "--task", ",".join(config.labels)]
    line += ["--force-domain", "--json", "--quiet"]  # few steps make pictures that the decoders do not know
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["images_per_second"]


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, ServingConfig, "python -m bench serving", __doc__)
    print(json.dumps({"command": f"python -m bench serving {' '.join(arguments)}", **measure(config)}, indent=1))
    return 0
