"""The text of a call: its rows as the guidance of a model wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from datasetdm_fast.data import Text, join_texts

if TYPE_CHECKING:
    from datasetdm_fast.engine.engines.engine import Engine


def call_text(
    engine: Engine, prompts: Sequence[str], guidance: float = 0.0, negatives: Callable[[], Text] | None = None
) -> Text:
    """The rows of a call for these prompts: of the negative prompts, by default empty ones, and of the prompts with
    classifier-free guidance, otherwise of the prompts alone. A guidance of 0 is the model's own; a family that guides
    itself then returns both halves.
    """
    model, usual = engine.model, engine.model.defaults.guidance
    if model.has_negative(guidance or usual):
        negative = negatives() if negatives else engine.encode_text([""] * len(prompts))
        text = join_texts([negative, engine.encode_text(list(prompts))])
        return replace(text, guidance=guidance or None) if model.backbone.guides_itself else text
    text = engine.encode_text(list(prompts))
    return replace(text, guidance=guidance or usual) if model.guidance == "embedded" else text
