"""The record of a student network: all that teaching and scoring must know of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bench.proof.students.student_data import Vocabulary
from datasetdm_fast.data import Annotation
from datasetdm_fast.engine.pictures.labelled import Labelled

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of each colour
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class StudentNetwork:
    """A network of the library transformers that answers for one task; images are [B, 3, H, W] fp32, normalised."""

    task: str
    model: str  # class of transformers
    config: str  # class of its settings
    sizes: Mapping[str, Mapping[str, Any]]  # name -> settings of a network without weights; the first is the default
    body: str  # how the tensors begin that --weights must hold; the others are the head, which may start anew
    loss: Callable[[nn.Module, Tensor, Sequence[Labelled], Vocabulary], Tensor]
    predict: Callable[[nn.Module, Tensor], Any]  # raw answers; where `mirror` is there, maps [B, C, H, W]
    read: Callable[[Any, Vocabulary], list[Annotation]]
    names: Callable[[Vocabulary], Sequence[str]] | None = None  # of what the outputs stand for; None: no classes
    settings: Callable[[Vocabulary, int], Mapping[str, Any]] = lambda vocabulary, side: {}  # by vocabulary and side
    mirror: Callable[[Vocabulary], Sequence[int]] | None = None  # the map each becomes in a mirror; None: no --tta
    colours: tuple[Sequence[float], Sequence[float]] = IMAGENET
    rate: float = 1e-3  # learning rate from the start
    fine_rate: float = 6e-5  # learning rate of the body from --weights; the head learns ten times as fast
    scales: tuple[float, float] = (0.5, 2.0)  # of the images that are learnt from
    prepared: Callable[[nn.Module], nn.Module] = lambda model: model  # what is changed of a network that was built
