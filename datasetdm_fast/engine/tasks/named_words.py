"""The class of a thing by the attention to the word that names it, together with what its decoder says."""

import torch
from torch import Tensor

from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.kernels.to_device import to_device

LEAST_MEAN = 1e-9  # attention below it is none
POWER = 10.0  # of the attention against the class probabilities of a decoder, which is surer of them than it is right


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
