"""An engine opened by name: model and decoders loaded and checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasetdm_fast.config import ENGINES, HALF
from datasetdm_fast.engine.engines import build_engine, check_engine
from datasetdm_fast.engine.engines.start import before_torch
from datasetdm_fast.errors import Missing, Refused, nearest

if TYPE_CHECKING:
    from datasetdm_fast.engine.decoders.folders import DecoderFolders
    from datasetdm_fast.engine.decoders.trunk import Decoder
    from datasetdm_fast.engine.engines.engine import Engine
    from datasetdm_fast.engine.loading.model import Model


RANDOM = "random"  # as --decoder: untrained ones of seeded weights, for tests and measurements


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
    lora: Sequence[str] = (),
    loaded: Model | None = None,
    outlines: str = "auto",
    guidance: float = 0.0,
    **options: Any,
) -> tuple[Engine, dict[str, Any]]:
    """An engine with the decoders of `tasks` (None: all), and their description; options as in EngineSettings. The
    dtype "half" is that of a long run in which --dtype auto measures, or auto where engine and device have none.

    A task stands for its own decoder, TASK:NAME for the one in the folder NAME. `lora` are adapters to fuse into the
    model, which may be `loaded` already; `outlines` are those of the labels. `guidance` is that of the images, 0 the
    model's own: some families make one call of two rows of it, and of 1 one of one row.
    """
    check_engine(engine, **options)
    before_torch()
    import torch

    from datasetdm_fast.engine.engines.device import half_of, resolve_device
    from datasetdm_fast.engine.loading import load_model

    if threads:
        torch.set_num_threads(threads)
    if loaded is None:
        loaded = load_model(model, size=size, allow_download=allow_download)
    if dtype == HALF:
        half, fitting = half_of(resolve_device(device)), ENGINES["fast" if engine == "auto" else engine].halves
        dtype = half if half in fitting and half in loaded.backbone.halves else "auto"
    if guidance:
        loaded = replace(loaded, scale=guidance)
    if lora:
        from datasetdm_fast.engine.loading.lora import fuse_adapters  # which few runs need

        loaded = fuse_adapters(loaded, lora)
    decoders, descriptions = load_decoders(loaded, decoder, tasks, outlines=outlines)
    return build_engine(engine, loaded, decoders, dtype=dtype, device=device, **options), descriptions


def load_decoders(
    model: Model, decoder: str | None, tasks: Sequence[str] | None = None, *, outlines: str = "auto"
) -> tuple[dict[str, Decoder], dict[str, Any]]:
    """The decoders of `tasks` (None: all) that --decoder names, checked against the model, and their descriptions."""
    from datasetdm_fast.engine.decoders.checkpoint import check_fits, for_inference, load_decoder
    from datasetdm_fast.engine.decoders.folders import SHIPPED, find_decoders
    from datasetdm_fast.engine.decoders.upstream import unpack_decoders
    from datasetdm_fast.engine.loading.presets import SEEDED_LICENCE

    decoders: dict[str, Decoder] = {}
    descriptions: dict[str, Any] = {}
    is_seeded = decoder == "demo" and model.licence == SEEDED_LICENCE  # what was trained for the demo model fits none
    if is_seeded or decoder == RANDOM:
        from datasetdm_fast.engine.decoders.checkpoint import seeded_decoders

        seeded, holder = seeded_decoders(model.levels, model.text_width), f"--decoder {RANDOM}, of seeded weights,"
        for label in check_known(tasks, seeded, list(seeded), list(seeded), holder):
            decoders[label] = for_inference(seeded[label], strict=False)
            descriptions[label] = {"digest": f"seeded: {label}", "licence": SEEDED_LICENCE}
    elif decoder is not None:
        source = model.name if decoder == "demo" and model.name in SHIPPED else decoder
        folders = find_decoders(unpack_decoders(source, model.levels))
        labels = check_known(tasks, folders, folders.labels, list(map(str, folders.named)), decoder)
        decoders = {label: load_decoder(folders[label]) for label in labels}
        descriptions = describe_decoders(folders, labels)
    for label, network in decoders.items():
        check_fits(network, model.levels, label, model.text_width)
        network.config = replace(network.config, outlines=network.config.outlines if outlines == "auto" else outlines)
    return decoders, descriptions


def check_known(
    tasks: Sequence[str] | None,
    known: DecoderFolders | Mapping[str, Any],
    labels: Sequence[str],
    names: Sequence[str],
    holder: str,
) -> Sequence[str]:
    """The requested labels, by default all; one that no decoder makes is refused. `names` are those of all decoders."""
    for label in tasks or ():
        if label in known:
            continue
        task, colon, _ = label.partition(":")
        others = [name for name in names if name.startswith(f"{task}:")]
        if colon:
            raise Refused(
                f"--task {label}: {holder} holds no decoder of this name{nearest(label, others)}",
                f"Choose from {', '.join(others or labels)}.",
            )
        if others:
            raise Refused(
                f"--task {label}: {holder} holds several decoders for it, and none is called {task}",
                f"Choose from {', '.join(others)}.",
            )
        raise Missing(
            f"--task {label}: {holder} holds no decoder for it, only for {', '.join(labels)}",
            "Name a folder that has one with --decoder, or drop the task.",
        )
    return labels if tasks is None else tasks


def describe_decoders(folders: DecoderFolders, labels: Sequence[str]) -> dict[str, Any]:
    """Digest and licence of each label's decoder files."""
    from datasetdm_fast.engine.loading.provenance import digest, folder_licence

    return {
        label: {
            "digest": digest([folders[label] / "config.json", folders[label] / "model.safetensors"]),
            "licence": folder_licence(folders[label].parent),
        }
        for label in labels
    }
