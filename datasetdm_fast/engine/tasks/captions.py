"""Captions and decoder outputs: classes that a caption rules out, and attention to the words that name the others."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.labels.class_tables import find_classes, token_places
from datasetdm_fast.kernels.transfer import to_device

OBJECT = 1  # of a decoder of words, the class logit that says "this query is the word"; logit 0 was never trained
LEAST_MEAN = 1e-9  # attention below it is none
POWER = 10.0  # of the attention against the class probabilities of a decoder, which is surer of them than it is right


def held_to(
    raw: dict[str, Tensor],
    config: DecoderConfig,
    prompts: Sequence[str],
    words: Sequence[str] = (),
    named: Sequence[Sequence[str]] = (),
    tokenizer: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """The raw outputs with the classes of `config.named` that prompt b does not name ruled out for image b; of `words`,
    all that it does not name. `named` are classes known to be in each image, whatever its prompt.

    A class that is ruled out gives its probability to the remaining classes, not to "no object". Outputs with the
    attention to the tokens of the prompt, whose `tokenizer` is then needed, get `word_attention` [B, K, h, w]. A prompt
    that names none of the classes changes nothing.
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
    batch, tokens, *sides = attention.shape
    relative = attention.new_ones(batch, len(config.classes), *sides)
    for b, (prompt, names) in enumerate(zip(prompts, present, strict=True)):
        places = token_places(prompt, config.named, tokenizer, tokens, config.table)
        if len(names) < 2 or not names <= set(places):
            continue
        for name in sorted(names):
            seen = torch.stack([attention[b, place] for place in places[name]]).mean(0)
            relative[b, config.classes.index(name)] = seen / seen.mean().clamp(min=LEAST_MEAN)
    return relative


def shared_by_words(share: Tensor, attention: Tensor, config: DecoderConfig) -> Tensor:
    """`share` [B, K, ...] of each class, with what it gives to classes that prompts name divided among them by the
    attention to their words, too.
    """
    is_named = to_device(torch.tensor([name in config.named for name in config.classes]), share.device)
    is_named = is_named.view(1, -1, *[1] * (share.ndim - 2)).to(share.dtype)
    named_share = share * is_named
    # in place, as these are the largest tensors of a label; relative to the largest, whose power would be 0 on its own
    relative = attention.clamp(min=LEAST_MEAN).mul_(named_share > 0)
    weighed = relative.div_(relative.amax(1, keepdim=True).clamp(min=LEAST_MEAN)).pow_(POWER).mul_(named_share)
    weighed *= named_share.sum(1, keepdim=True) / weighed.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    return torch.addcmul(weighed, share, 1 - is_named)
