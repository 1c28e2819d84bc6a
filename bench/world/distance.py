"""How far two sets of pictures are from each other, in the features of a net that has only seen renders."""

import numpy as np
import torch
from torch import Tensor

from bench.world.judge_net import Judge, batches


@torch.inference_mode()
def features(judge: Judge, images: np.ndarray) -> Tensor:
    """[N, C] means over the places of what each resolution of a judge makes of images [N, H, W, 3]."""
    return torch.cat([torch.cat([x.mean((2, 3)) for x in judge.encode(one)], 1) for one in batches(images)]).double()


def frechet(one: Tensor, other: Tensor) -> float:
    """The Fréchet distance of two sets of features [N, C], each taken as a Gaussian."""
    apart = (one.mean(0) - other.mean(0)).square().sum()
    first, second = torch.cov(one.T), torch.cov(other.T)
    both = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return float(apart + first.trace() + second.trace() - 2 * both)
