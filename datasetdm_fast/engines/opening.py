"""An engine opened by name: model and decoders loaded and checked first."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.engines import build_engine, check_engine
from datasetdm_fast.errors import Missing

if TYPE_CHECKING:
    from datasetdm_fast.decoders.trunk import Decoder
    from datasetdm_fast.engines.engine import Engine
    from datasetdm_fast.loading.model import Model


def open_engine(
    model: str = "demo",
    decoder: str | None = "demo",
    tasks: Sequence[str] | None = None,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    size: int = 0,
    allow_download: bool = False,
    threads: int = 0,
    **options: Any,
) -> tuple[Engine, dict[str, Any]]:
    """An engine with the decoders of `tasks` (None: all), and their description; options as in EngineSettings."""
    check_engine(engine, **options)
    # OpenMP's waiting threads would otherwise burn the cores other processes need; read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from datasetdm_fast.decoders.checkpoint import check_levels, load_decoders
    from datasetdm_fast.loading import load_model
    from datasetdm_fast.loading.presets import SEEDED_LICENCE

    if threads:
        torch.set_num_threads(threads)
    loaded = load_model(model, size=size, allow_download=allow_download)
    is_seeded = decoder == "demo" and loaded.licence == SEEDED_LICENCE  # what was trained for the demo model fits none
    found = _seeded(loaded) if is_seeded else load_decoders(decoder) if decoder else {}
    tasks = tuple(found) if tasks is None else tasks
    for task in tasks:
        if task not in found:
            raise Missing(
                f"--task {task}: {decoder} holds no decoder for it, only for {', '.join(found)}",
                "Name a folder that has one with --decoder, or drop the task.",
            )
        check_levels(found[task], loaded.levels)
    chosen = {task: found[task] for task in tasks}
    built = build_engine(engine, loaded, chosen, dtype=dtype, device=device, **options)
    if is_seeded:
        return built, {task: {"digest": f"seeded: {task}", "licence": SEEDED_LICENCE} for task in tasks}
    return built, describe_decoders(decoder, tasks) if decoder else {}


def _seeded(loaded: Model) -> dict[str, Decoder]:
    from datasetdm_fast.decoders.checkpoint import for_inference
    from datasetdm_fast.decoders.seeded import seeded_decoders

    found = seeded_decoders(loaded.levels, loaded.text_encoder.config.hidden_size)
    return {task: for_inference(decoder, strict=False) for task, decoder in found.items()}


def describe_decoders(folder: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Digest and licence of each task's decoder files."""
    from datasetdm_fast.decoders.checkpoint import DEMO
    from datasetdm_fast.loading.provenance import digest, folder_licence

    root, found = DEMO if folder == "demo" else Path(folder), {}
    for config in sorted(root.glob("*/config.json")):
        task = json.loads(config.read_text(encoding="utf-8"))["task"]
        if task in tasks:
            found[task] = {
                "digest": digest([config, config.with_name("model.safetensors")]),
                "licence": folder_licence(root),
            }
    return found
