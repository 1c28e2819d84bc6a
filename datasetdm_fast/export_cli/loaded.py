"""Model and decoders loaded for export, and its progress messages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from datasetdm_fast.export_cli.settings import ExportConfig


def teller(config: ExportConfig) -> Callable[[str], None]:
    """Says which stage is being written, unless all is to be quiet."""

    def told(stage: str) -> None:
        if not config.quiet:
            print(f"{stage}", file=sys.stderr, flush=True)

    return told


def load(config: ExportConfig) -> tuple[Any, dict[str, Any]]:
    """The model and its decoders."""
    from datasetdm_fast.decoders.checkpoint import check_levels, load_decoders
    from datasetdm_fast.loading import load_model

    model = load_model(config.model, size=config.size, allow_download=config.allow_download)
    decoders = {} if config.decoder == "none" else load_decoders(config.decoder)
    for decoder in decoders.values():
        check_levels(decoder, model.levels)
    return model, decoders
