"""What the classes that a caption names rule out in a decoder's answers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from datasetdm_fast.decoders.config import DecoderConfig
from datasetdm_fast.labels.words import find_classes
from datasetdm_fast.tasks.open_vocabulary import OBJECT


def held_to(
    raw: dict[str, Tensor],
    config: DecoderConfig,
    prompts: Sequence[str],
    words: Sequence[str] = (),
    named: Sequence[Sequence[str]] = (),
) -> dict[str, Tensor]:
    """The raw answers with the classes of `config.named` that prompt b does not name ruled out for image b; of `words`,
    all it does not name. `named` are classes known to be in each image, whatever its prompt says.

    A prompt that names none of them says nothing about what is to be seen, and rules nothing out.
    """
    if not config.named:
        return raw
    logits = raw["pred_logits"]
    is_open = config.has_text
    ruled_out = torch.zeros(len(prompts), len(words) if is_open else len(config.classes), dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        asked = words if is_open else config.named
        there = {*find_classes(prompt, asked), *(named[b] if named else ())} & set(asked)
        if there:
            absent = set(asked) - there
            ruled_out[b] = torch.tensor([name in absent for name in (words if is_open else config.classes)])
    ruled_out = ruled_out.to(logits.device)
    if is_open:
        held = logits.clone()
        held[..., OBJECT].masked_fill_(ruled_out[:, :, None], float("-inf"))
    else:
        held = torch.cat([logits[..., :-1].masked_fill(ruled_out[:, None], float("-inf")), logits[..., -1:]], -1)
    return {**raw, "pred_logits": held}
