"""A sampling schedule as data: timesteps and the coefficients of each update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """Coefficients of one call."""

    sample: float
    weights: tuple[float, ...]  # of this call's entry, then of the earlier ones, newest first
    entry: tuple[float, float] = (0.0, 1.0)  # entry = entry[0] * x + entry[1] * output
    restarts: bool = False  # x is the sample of call 0: the warm-up correction of PLMS
    is_kept: bool = True  # whether later calls read this call's entry


@dataclass(frozen=True)
class Schedule:
    """Timesteps and coefficients of every UNet call of one image."""

    memory: int  # earlier entries that its updates read
    prediction_type: str
    timesteps: tuple[int, ...]
    updates: tuple[Update, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class Sampler:
    """What the rest must know of a sampler."""

    # (scheduler config, cumulative alphas, steps, prediction type, profile) -> timesteps and updates
    calls: Callable[[Mapping, Tensor, int, str, str], tuple[list[int], list[Update]]]
    memory: int  # earlier entries it reads
    least_steps: int = 1
