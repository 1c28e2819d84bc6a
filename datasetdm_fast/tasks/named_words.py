"""The class of a thing by the attention to the word that names it, together with what its decoder says."""

import torch
from torch import Tensor

from datasetdm_fast.decoders.config import DecoderConfig

LEAST_MEAN = 1e-9  # attention below it is none
POWER = 10.0  # of the attention against the class probabilities of a decoder, which is surer of them than it is right


def shared_by_words(share: Tensor, attention: Tensor, config: DecoderConfig) -> Tensor:
    """`share` [B, K, ...] of each class, with what it gives to classes that prompts name divided among them by the
    attention to their words, too.
    """
    is_named = torch.tensor([name in config.named for name in config.classes], device=share.device)
    is_named = is_named.view(1, -1, *[1] * (share.ndim - 2))
    own = torch.where(is_named, share, 0)
    said = (attention.clamp(min=LEAST_MEAN).log() * POWER).masked_fill(own <= 0, -float("inf"))
    weighed = own * (said - said.amax(1, keepdim=True)).nan_to_num(-float("inf")).exp()
    total = own.sum(1, keepdim=True)
    divided = weighed / weighed.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny) * total
    return torch.where(is_named, divided, share)
