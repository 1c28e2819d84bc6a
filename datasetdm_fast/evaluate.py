"""python -m datasetdm_fast.evaluate: how true the labels of trained decoders are, on images whose truth is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from datasetdm_fast.config import ENGINES, TASKS, setting
from datasetdm_fast.errors import Refused


@dataclass(frozen=True)
class EvaluateConfig:
    model: str = setting("demo", "demo, random-sd14, tiny, a diffusers folder or a .safetensors/.ckpt file", metavar="MODEL")
    decoder: str = setting("demo", "folder of trained decoders, one sub-folder per task", metavar="DIR")
    data: str = setting("demo:500@900000", "labelled images: demo:COUNT@FIRST_SEED", metavar="NAME:REST")
    task: tuple[str, ...] = setting((), "labels to judge, comma-separated; default: every decoder of the folder", choices=TASKS, metavar="LIST")
    captions: str = setting("true", "what the text half sees: each image's own caption, or nothing", choices=("true", "none"))
    engine: str = setting("auto", "how the networks run", choices=ENGINES)
    dtype: str = setting("auto", "arithmetic of the fast engines", choices=("auto", "fp32", "fp16", "bf16"))
    device: str = setting("auto", "cpu, cuda or cuda:N", metavar="DEVICE")
    batch_size: int = setting(10, "images read together", metavar="N")
    seed: int = setting(0, "seed of the noise of image 0; image k has seed + k", metavar="N")
    threads: int = setting(0, "CPU threads, 0 = all cores", metavar="N")
    json: bool = setting(False, "the figures as one JSON object on stdout")
    quiet: bool = setting(False, "no progress")


def evaluate(
    engine, source, tasks: Sequence[str], captions: str = "true", batch_size: int = 10, seed: int = 0, progress: Callable[[int], None] = lambda count: None
) -> dict:
    """{task: {metric: value}} of the engine's decoders over a data set, every image read through the capture path."""
    import numpy as np
    import torch

    from datasetdm_fast.inversion import capture_timestep, invert
    from datasetdm_fast.metrics import METRICS
    from datasetdm_fast.tasks import TASKS as LABELLERS

    meters = {task: METRICS[task](source) for task in tasks}
    timestep = capture_timestep(engine.decoders[task].config for task in tasks)
    words = engine.encode_classes(list(source.thing_classes)) if "open-vocabulary" in tasks else None
    for start in range(0, len(source), batch_size):
        items = [source[k] for k in range(start, min(start + batch_size, len(source)))]
        said = [item.caption if captions == "true" else "" for item in items]
        capture = invert(engine, torch.from_numpy(np.stack([item.image for item in items])), said, timestep, range(seed + start, seed + start + len(items)))
        for task, meter in meters.items():
            is_open = task == "open-vocabulary"
            raw = engine.annotate(task, capture, words[None].expand(len(items), -1, -1) if is_open else None)
            config = engine.decoders[task].config
            if task == "instance":
                config = replace(config, score_threshold=0.0)  # AP ranks every candidate itself
            found = LABELLERS[task].postprocess(raw, config, engine.model.size, **({"words": source.thing_classes} if is_open else {}))
            for item, label in zip(items, found):
                meter.add(item, label)
        progress(start + len(items))
    return {task: meter.result() for task, meter in meters.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    from datasetdm_fast.flags import run_command

    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    from datasetdm_fast.flags import parse

    config, _ = parse(arguments, EvaluateConfig, "datasetdm-fast evaluate", __doc__)
    if config.batch_size < 1:
        raise Refused(f"--batch-size: {config.batch_size} is not at least 1")
    from datasetdm_fast.engines import build_engine, check_engine

    check_engine(config.engine)
    import torch

    from datasetdm_fast.loading import load_model
    from datasetdm_fast.models.decoders import check_levels, load_decoders
    from datasetdm_fast.readers import open_data

    if config.threads:
        torch.set_num_threads(config.threads)
    decoders = load_decoders(config.decoder)
    tasks = config.task or tuple(task for task in TASKS if task in decoders)
    absent = [task for task in tasks if task not in decoders]
    if absent:
        raise Refused(f"--task: {config.decoder} holds no decoder for {', '.join(absent)}", f"it has {', '.join(decoders)}")
    model = load_model(config.model)
    source = open_data(config.data, model.size)
    for decoder in decoders.values():
        check_levels(decoder, model.levels)
    engine = build_engine(config.engine, model, decoders, dtype=config.dtype, device=config.device)
    from tqdm import tqdm

    with tqdm(total=len(source), unit="img", disable=config.quiet or None, file=sys.stderr) as bar:
        result = evaluate(engine, source, tasks, config.captions, config.batch_size, config.seed, lambda done: bar.update(done - bar.n))
    if config.json:
        print(json.dumps(result))
    else:
        for task, figures in result.items():
            print(f"{task:16}" + "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, float)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
