"""Whether the parts of a folder are of one model, as every family asks it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.engine.backbones.record import ANOTHER, DAMAGED, LoadedModel, Read
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import FACTOR
from datasetdm_fast.untrusted import documents

TOGETHER = "Take every part from the same model."


def check_settings(configs: Read, source: str, part: str, supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses a part by the first of its settings whose value is none of those supported, the first of which is what a
    missing one means.
    """
    for name, (usual, *others) in supported.items():
        value = configs[part].get(name, usual)
        if type(value) is bool and type(usual) is not bool or value not in (usual, *others):
            raise Refused(
                f"model: {source}: the {part}'s {name} is {documents.quote(value)} where {usual!r} is expected, so it "
                "is a model of another kind",
                ANOTHER,
            )


def check_autoencoder(vae: Mapping[str, Any], source: Path | str) -> None:
    """Refuses an autoencoder whose latents are not scaled by numbers, or have cells of another size."""
    numbers = {"scaling_factor": (vae.get("scaling_factor", 1.0), 0.0, " above 0")}
    numbers["shift_factor"] = vae.get("shift_factor") or 0.0, -math.inf, ""
    for name, (value, least, bound) in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least < value < math.inf:
            raise Refused(
                f"model: {source}: the vae's {name} is {documents.quote(value)}, expected a number{bound}", DAMAGED
            )
    if (pixels := 2 ** (len(vae.get("dim_mult") or vae["block_out_channels"]) - 1)) != FACTOR:
        raise Refused(
            f"model: {source}: a latent cell of the vae is {pixels} x {pixels} pixels, expected {FACTOR} x {FACTOR}",
            ANOTHER,
        )


def check_channels(source: str, read: Any, vae: Mapping[str, Any], cells: int = 1) -> None:
    """Refuses an autoencoder of another form, and a denoiser that reads other latents than it gives, as those that edit
    images do; `cells` of them are one token where it reads them packed.
    """
    check_autoencoder(vae, source)
    supplied = cells * vae.get("latent_channels", vae.get("z_dim"))
    if read != supplied:
        raise Refused(
            f"model: {source}: the denoiser reads {documents.quote(read)} channels where the latents of the vae have "
            f"{documents.quote(supplied)}, so it is a model of another kind, such as one that edits images",
            ANOTHER,
        )


def check_widths(model: LoadedModel, widths: Mapping[str, tuple[int, int]]) -> None:
    """Refuses a text whose width for the denoiser is not the one of its encoders: what -> (read, supplied)."""
    for what, (read, supplied) in widths.items():
        if read != supplied:
            raise Refused(
                f"model: {model.name}: the denoiser reads {what} of width {read}, the encoders give {supplied}, so "
                "they belong to different models",
                TOGETHER,
            )


def check_vocabularies(model: LoadedModel) -> None:
    """Refuses a tokenizer with more entries than its text encoder knows."""
    for part in model.backbone.of_kind("text_encoder"):
        if part not in model.configs:
            continue
        config: Any = model.configs[part]
        tokenizer = model.loaded_tokenizers[part.replace("text_encoder", "tokenizer")]
        known: int = getattr(config, "text_config", config).vocab_size
        if len(tokenizer) > known:
            raise Refused(
                f"model: {model.name}: the tokenizer of the {part} has {len(tokenizer)} entries, it knows {known}",
                TOGETHER,
            )
