"""The data types passed along from a prompt to a labelled sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.messages import count_noun

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = 255  # the pixel of a label map that is ignored or uncertain


@dataclass(frozen=True)
class Request:
    """One image to make; its noise comes from `seed` alone."""

    index: int
    prompt: str
    seed: int
    classes: tuple[str, ...] = ()  # class words the prompt names, for open-vocabulary labels and per-class balance
    negative: str = ""  # text of the unconditional half
    class_prompt: str = ""  # of labels from attention; empty: made of the class words

    @property
    def id(self) -> str:
        return f"{self.index:08d}"


@dataclass(frozen=True)
class Batch:
    """Requests made together, as the plan fixed them; `padding` repeats of the last are discarded."""

    index: int
    requests: tuple[Request, ...]
    padding: int = 0

    @property
    def padded(self) -> tuple[Request, ...]:
        return self.requests + (self.requests[-1],) * self.padding


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of encoded prompts: what a denoiser reads beside its latents."""

    context: Tensor  # [R, T, D]
    pooled: Tensor | None = None  # [R, P]
    mask: Tensor | None = None  # [R, T] bool, the tokens that are read; None: all
    guidance: float | None = None  # what a model whose guidance is embedded reads beside its text
    concepts: int = 0  # rows at the end of the context that are words of ConceptAttention

    def __len__(self) -> int:
        return len(self.context)

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The rows after a change of each tensor."""
        pooled, mask = (None if part is None else change(part) for part in (self.pooled, self.mask))
        return Text(change(self.context), pooled, mask, self.guidance, self.concepts)

    def __getitem__(self, rows: slice | Sequence[int]) -> Text:
        return self.map(lambda part: part[rows])

    def expand(self, count: int) -> Text:
        """One row, `count` times."""
        return self.map(lambda part: part.expand(count, *part.shape[1:]))

    def cast(self, dtype: torch.dtype) -> Text:
        """The text with its numbers, but not its mask, in this precision."""
        return self.map(lambda part: part.to(dtype) if part.is_floating_point() else part)

    def to(self, device: torch.device | str) -> Text:
        return self.map(lambda part: part.to(device))


def join_texts(texts: Sequence[Text]) -> Text:
    """The rows of several texts end to end; where their lengths differ the shorter are padded and masked."""
    import torch
    from torch.nn.functional import pad

    first, longest = texts[0], max(text.context.shape[1] for text in texts)
    is_masked = any(text.mask is not None or text.context.shape[1] < longest for text in texts)

    contexts, masks = [], []
    for text in texts:
        rows, tokens = text.context.shape[:2]
        mask = text.context.new_ones((rows, tokens), dtype=torch.bool) if text.mask is None else text.mask
        contexts.append(pad(text.context, (0, 0, 0, longest - tokens)))
        masks.append(pad(mask, (0, longest - tokens)))
    pooled = None if first.pooled is None else torch.cat([text.pooled for text in texts if text.pooled is not None])
    return Text(torch.cat(contexts), pooled, torch.cat(masks) if is_masked else None, first.guidance)


@dataclass(frozen=True)
class Capture:
    """What the decoders read, taken at one UNet call: levels low, mid, high, highest (stages.LEVELS)."""

    features: tuple[tuple[Tensor, ...], ...]  # per level: [B, halves * C, h, w], joined per image: [uncond_b | cond_b]
    maps: tuple[tuple[Tensor, ...], ...]  # per level: [B, heads, h*w, T], conditional half, up before down layers

    def of(self, task: str) -> Capture:
        """The part of one task: all of it."""
        return self

    def to(self, dtype: torch.dtype) -> Capture:
        features, maps = (
            tuple(tuple(x.to(dtype) for x in level) for level in part) for part in (self.features, self.maps)
        )
        return Capture(features, maps)

    @property
    def batch(self) -> int:
        return self.features[-1][0].shape[0]

    @property
    def side(self) -> int:
        """Cells of a side of the highest level."""
        return self.features[-1][0].shape[-1]


@dataclass(frozen=True)
class ProjectedCapture:
    """A capture after the first layers of a run's decoders: the only thing they read of it, and far smaller."""

    sums: tuple[Tensor, ...]  # per level: [B, F, h, w] fp32, the widths of all decoders end to end
    slices: Mapping[str, tuple[slice, ...]]  # task -> per level, the channels that are its own

    def of(self, task: str) -> ProjectedCapture:
        """The part of one task."""
        slices = self.slices[task]
        parts = tuple(total[:, part] for total, part in zip(self.sums, slices))
        return ProjectedCapture(parts, {task: tuple(slice(0, part.stop - part.start) for part in slices)})

    def to(self, dtype: torch.dtype) -> ProjectedCapture:
        return ProjectedCapture(tuple(total.to(dtype) for total in self.sums), self.slices)

    @property
    def batch(self) -> int:
        return self.sums[-1].shape[0]

    @property
    def side(self) -> int:
        """Cells of a side of the highest level."""
        return self.sums[-1].shape[-1]


AnyCapture = Capture | ProjectedCapture


@dataclass(frozen=True)
class AttentionSums:
    """Attention probabilities of the conditional half, averaged over the layers of one side and over heads, and summed
    over the calls so far.
    """

    cells: Tensor  # [B, S, S] fp32: self-attention, a row for each query
    tokens: Tensor  # [B, N, T] fp32: N cells over the tokens of the class prompt

    def over(self, calls: int) -> AttentionSums:
        """The average over so many calls."""
        return AttentionSums(self.cells / calls, self.tokens / calls)

    def to(self, device: torch.device | str) -> AttentionSums:
        return AttentionSums(self.cells.to(device), self.tokens.to(device))


@dataclass(frozen=True, eq=False, repr=False)
class SemanticMap:
    labels: np.ndarray  # [H, W] uint8, 255 = ignore; int32 for 256 query words and more
    confidence: np.ndarray  # [H, W] float32, 0..1
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        shown = [self.classes[k] for k in np.unique(self.labels) if k < len(self.classes)]
        return f"<SemanticMap {_sides(self.labels)}: {', '.join(shown)}>"


@dataclass(frozen=True, eq=False, repr=False)
class Instances:
    masks: np.ndarray  # [N, H, W] bool
    class_ids: np.ndarray  # [N] int64, index into classes
    scores: np.ndarray  # [N] float32
    classes: tuple[str, ...]
    ids: np.ndarray | None = None  # [N] int64, in the run's COCO file; None: numbered there in order

    def __repr__(self) -> str:
        shown = [f"{self.classes[k]} {score:.2f}" for k, score in zip(self.class_ids, self.scores)]
        return f"<Instances {_sides(self.masks)}: {', '.join(shown) or 'none'}>"


@dataclass(frozen=True, eq=False, repr=False)
class DepthMap:
    metres: np.ndarray  # [H, W] float32
    max_depth: float

    def __repr__(self) -> str:
        return f"<DepthMap {_sides(self.metres)}: {self.metres.min():.2f} to {self.metres.max():.2f} m>"


@dataclass(frozen=True, eq=False, repr=False)
class Keypoints:
    points: np.ndarray  # [P, J, 3] float32: x, y in pixels from the outer edge of the first, score 0..1
    visibility: np.ndarray  # [P, J] int64: 2 visible, 1 labelled but hidden, 0 absent (COCO)
    scores: np.ndarray  # [P] float32
    joints: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...] = ()

    def __repr__(self) -> str:
        seen = [f"{int((visible > 0).sum())} of {len(self.joints)} joints" for visible in self.visibility]
        return f"<Keypoints of {count_noun(len(self.points), 'person', 'people')}: {', '.join(seen) or 'none'}>"


Annotation = SemanticMap | Instances | DepthMap | Keypoints


@dataclass(frozen=True)
class DomainDistance:
    """How far a picture, each class it shows, and all that its model draws of the training captions, are from what a
    decoder was trained on; above 1 they are out of its domain.
    """

    picture: float
    things: Mapping[str, float] = field(default_factory=dict)
    model: float = 0.0


@dataclass(frozen=True)
class Trust:
    """Whether the labels of a sample fit its prompt and one another; what is doubtful has its reasons."""

    missing: tuple[str, ...] = ()  # classes that the prompt names and a label lacks
    unnamed: tuple[str, ...] = ()  # things that a label shows and the prompt does not name
    disagreeing: float = 0.0  # share of the pixels of things that two labels call by different names
    confidence: float | None = None  # mean over the decoders that tell one
    reasons: tuple[str, ...] = ()
    domain: float | None = None  # distance from what its decoders were trained on; above 1 it is out of their domain

    @property
    def is_trusted(self) -> bool:
        return not self.reasons


class NamedLabels:
    """The labels of a sample by name, None where it has no such label."""

    def label(self, task: str) -> Any:
        """The label of a task, None where there is none."""
        raise NotImplementedError

    @property
    def semantic(self) -> SemanticMap | None:
        return self.label("semantic")

    @property
    def instances(self) -> Instances | None:
        return self.label("instance")

    @property
    def depth(self) -> DepthMap | None:
        return self.label("depth")

    @property
    def keypoints(self) -> Keypoints | None:
        return self.label("pose")

    @property
    def open_vocabulary(self) -> SemanticMap | None:
        return self.label("open-vocabulary")

    @property
    def attention(self) -> SemanticMap | None:
        return self.label("attention")


@dataclass(frozen=True, eq=False, repr=False)
class Sample(NamedLabels):
    request: Request
    image: np.ndarray  # [H, W, 3] uint8
    annotations: dict[str, Annotation]  # task -> label
    provenance: dict[str, Any] = field(default_factory=dict)
    trust: Trust | None = None  # None if its labels have no trust score
    rejection: str = ""  # why its run quarantines it; empty for a sample of the data set

    def __repr__(self) -> str:
        labels, request = ", ".join(self.annotations), self.request
        return f"<Sample {_sides(self.image[..., 0])}: {request.prompt!r}, seed {request.seed}, labels {labels}>"

    def label(self, task: str) -> Any:
        """The label of a task, or of TASK:NAME, None where it was not requested."""
        return self.annotations.get(task)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> str:
        return self.request.prompt

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def classes(self) -> tuple[str, ...]:
        return self.request.classes

    @property
    def is_doubtful(self) -> bool:
        return self.trust is not None and not self.trust.is_trusted


@dataclass(frozen=True)
class Quarantined:
    """A request whose images or labels did not come out as numbers; it is recorded, never written."""

    request: Request
    reason: str


def _sides(plane: np.ndarray) -> str:  # [..., H, W]
    return " x ".join(map(str, plane.shape[:-3:-1]))
