"""Names of the exported stages, and what a name says about its stage."""

from collections.abc import Iterable, Sequence
from typing import Any

from datasetdm_fast.engine.labels import LabelName
from datasetdm_fast.errors import check_choice

RAW = "denoise_and_capture_raw"
TEXT = {"encode_text"}
OTHERS = (*TEXT, "decode_image", "encode_image")
AVERAGE = "denoise_and_average"  # followed by the sides whose self-attention and cross-attention it averages


def select_stages(
    labels: Iterable[str],
    raw_capture: bool,
    averages: tuple[int, ...] | None = None,
    only: Sequence[str] | None = None,
    others: Sequence[str] = OTHERS,
) -> tuple[str, ...]:
    """The stages of an export; without decoders there is nothing to capture but the features and maps themselves.
    `others` are those of text encoders and autoencoder that are graphs.
    """
    decoders = [annotate_name(label) for label in labels]
    captures = [*(["denoise_and_capture"] if decoders else []), *([RAW] if raw_capture else [])]
    captures += [average_name(*averages)] if averages else []
    texts, images = ([name for name in others if (name in TEXT) == is_text] for is_text in (True, False))
    names = [*texts, "denoise", *captures, *images, *decoders]
    for name in only or ():
        check_choice("stage", name, names)
    return tuple(name for name in names if only is None or name in only)


def average_name(self_side: int, cross_side: int) -> str:
    """The stage that averages the attention of these sides."""
    return f"{AVERAGE}_{self_side}_{cross_side}"


def averaged_sides(stage: str) -> tuple[int, ...]:
    """The sides whose attention a stage averages; none of any other stage."""
    return tuple(map(int, stage.removeprefix(AVERAGE).split("_")[1:])) if stage.startswith(AVERAGE) else ()


def separate_options(stage: str) -> dict[str, Any]:
    """The options that export a stage which few runs need into a folder of its own; none for the other stages."""
    if stage == RAW:
        return {"raw_capture": True, "only": [RAW]}
    return {"averages": averaged_sides(stage), "only": [stage]} if averaged_sides(stage) else {}


def annotate_name(label: str) -> str:
    """The stage of the decoder of a label."""
    return f"annotate_{LabelName.parse(label).stem}"


def label_of(stage: str) -> str:
    """The label whose decoder a stage is."""
    return str(LabelName.of_stem(stage.removeprefix("annotate_")))
