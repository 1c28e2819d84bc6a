"""What a caption says about a decoder's answers: classes that it rules out, and where the words of the others stand."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.labels.words import find_classes, token_places
from datasetdm_fast.engine.tasks.named_words import LEAST_MEAN
from datasetdm_fast.engine.tasks.open_vocabulary import OBJECT
from datasetdm_fast.kernels.to_device import to_device


def held_to(
    raw: dict[str, Tensor],
    config: DecoderConfig,
    prompts: Sequence[str],
    words: Sequence[str] = (),
    named: Sequence[Sequence[str]] = (),
    tokenizer: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """The raw answers with the classes of `config.named` that prompt b does not name ruled out for image b; of `words`,
    all it does not name. `named` are classes known to be in each image, whatever its prompt says.

    What is ruled out gives its probability to the classes that are left, not to "no object". Answers with the attention
    to the tokens of the prompt, whose `tokenizer` is then needed, get `word_attention` [B, K, h, w]. A prompt that
    names none of the classes says nothing about what is to be seen, and changes nothing.
    """
    if not config.named:
        return raw
    is_open = config.has_text
    queries, classes = (words, words) if is_open else (config.named, config.classes)
    present = [
        {*find_classes(prompt, queries, config.table), *(named[b] if named else ())} & set(queries)
        for b, prompt in enumerate(prompts)
    ]
    device = raw["pred_logits"].device
    is_ruled_out = [[bool(names) and name in queries and name not in names for name in classes] for names in present]
    ruled_out = to_device(torch.tensor(is_ruled_out, dtype=torch.bool), device)
    if is_open:
        held = raw["pred_logits"].clone()
        held[..., OBJECT].masked_fill_(ruled_out[:, :, None], float("-inf"))
        return {**raw, "pred_logits": held}
    is_query = to_device(torch.tensor([name in queries for name in (*classes, None)]), device)
    outputs = {**raw, "pred_logits": without(raw["pred_logits"].float(), ruled_out, is_query)}
    if "token_attention" in raw and tokenizer is not None:
        outputs["word_attention"] = word_attention(raw["token_attention"].float(), config, prompts, present, tokenizer)
    return outputs


def without(logits: Tensor, ruled_out: Tensor, is_query: Tensor) -> Tensor:
    """Logits [B, N, K + 1] whose classes `ruled_out` [B, K] have no probability, and whose other classes that are asked
    for [K + 1] have in sum what all of them had.
    """
    sure = logits.log_softmax(-1)
    left = torch.cat([ruled_out, ruled_out.new_zeros(len(ruled_out), 1)], 1)[:, None]
    remaining = sure.masked_fill(left | ~is_query, float("-inf")).logsumexp(-1, keepdim=True)
    total = sure.masked_fill(~is_query, float("-inf")).logsumexp(-1, keepdim=True)
    is_changed = left.any(-1, keepdim=True) & is_query
    return torch.where(is_changed, logits + (total - remaining), logits).masked_fill(left, float("-inf"))


def word_attention(
    attention: Tensor,
    config: DecoderConfig,
    prompts: Sequence[str],
    present: Sequence[set[str]],
    tokenizer: Callable[..., Any],
) -> Tensor:
    """[B, K, h, w] the attention to the words that name a class, as a multiple of its mean over the image; 1 for
    classes that are not named, and for all of an image of which one class's word does not stand in the prompt.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, truncation=False).input_ids) - 2

    batch, tokens, *sides = attention.shape
    relative = attention.new_ones(batch, len(config.classes), *sides)
    for b, (prompt, names) in enumerate(zip(prompts, present, strict=True)):
        places = token_places(prompt, config.named, count, tokens, config.table)
        if len(names) < 2 or not names <= set(places):
            continue
        for name in sorted(names):
            seen = torch.stack([attention[b, place] for place in places[name]]).mean(0)
            relative[b, config.classes.index(name)] = seen / seen.mean().clamp(min=LEAST_MEAN)
    return relative
