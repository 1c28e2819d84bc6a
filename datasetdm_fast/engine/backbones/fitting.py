"""Whether the parts of a folder are of one model, as every family asks it."""

from collections.abc import Mapping
from typing import Any

from datasetdm_fast.engine.backbones.record import ANOTHER, LoadedModel, Read
from datasetdm_fast.errors import Refused
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


def check_channels(source: str, read: Any, supplied: Any) -> None:
    """Refuses a denoiser that reads other latents than the autoencoder gives, as those that edit images do."""
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
        tokenizer = model.tokenizers[part.replace("text_encoder", "tokenizer")]
        known: int = getattr(config, "text_config", config).vocab_size
        if len(tokenizer) > known:
            raise Refused(
                f"model: {model.name}: the tokenizer of the {part} has {len(tokenizer)} entries, it knows {known}",
                TOGETHER,
            )
