"""How long a decoder is taught, and how."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSchedule:
    steps: int = 1500
    batch_size: int = 16
    rate: float = 1e-3
    optimiser: str = "adamw"  # or adam
    decay: str = "cosine"  # or steps: a tenth after every `decay_every` images
    decay_every: int = 0
    warmup: int = 50  # steps
    weight_decay: float = 0.05
    average: float = 0.995  # of the weights; 0 = the last weights are kept
    clip: float = 1.0  # norm of the gradient; 0 = as it is
    points: int = 2048  # sampled on each mask; upstream takes 12544 at 512 pixels
    sigma: float = 1.0  # heatmap width in its own cells; upstream 2 at 64 cells
    dropout: float = (
        0.3  # share of feature channels hidden from each view, so that a hundred images are not learnt by heart
    )
    is_deep: bool = True  # whether every layer of a transformer is taught; upstream only the last
    is_absence_taught: bool = (
        True  # whether a joint that is not in the picture has an empty heatmap; upstream's loss leaves it out
    )
    gain: float = 100.0  # of the heatmap loss
    is_relative: bool = False  # whether depth learns by its mean relative error, not by scale-invariant logarithms
    first_word_only: bool = False  # upstream's Q11
    parts: int = (
        2  # a batch is worked through in so many over all processes, so that one process and two learn to the same bits
    )
    seed: int = 0
