"""The domain of a decoder: what the captures of its training pictures look like, and how far a sample is from them.

A picture and each thing in it are described by means of the decoder's projected levels. Their distance is that of
Mahalanobis (Lee et al. 2018), over the distance that 99 % of held-out pictures keep to: above 1 is out of domain.
A model that draws less than was taught has no picture that is far by itself. So `train` generates some from its own
captions, and the distance of their mean counts for every sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from datasetdm_fast.data import Annotation, DomainDistance, Instances, SemanticMap
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import SHOWN_SCORE
from datasetdm_fast.engine.labels.trust import NO_THING
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents, tensors

FILE = "domain.safetensors"
MIXTURES = 16  # of the channels of each level, which alone are compared
LARGEST_SIDE = 32  # cells of a side at which things are described
SHRINKAGE = 0.1  # of correlations towards none, as there are few pictures
QUANTILE = 2.326  # standard deviations of the logarithm of a distance below which 99 % of them lie
MARGIN = 1.15  # generated pictures of a domain vary more than its photos,
MARGIN_OF_THINGS = 1.3  # and predicted masks more than those of the truth
LEAST_IMAGES = 8  # pictures below which their spread is unknown
FOLDS = 5
LEAST_SHARE = 1 / 100  # of the picture: smaller things are not described
FARTHEST_MEAN = 1 / 3  # of generated pictures from the mean of those taught, in typical distances of a picture,
FARTHEST_OF_NAMES = 1 / 2  # and where captions are lists of names: a model draws these otherwise than sentences


@dataclass(frozen=True)
class Spread:
    """Means of descriptors, one of each class or a single one, and their covariance; in units of `scale`."""

    means: np.ndarray  # [K, D]
    scale: np.ndarray  # [D]
    correlations: np.ndarray  # [D, D]
    limits: np.ndarray  # [K]: the mean of few pictures is uncertain itself

    @cached_property
    def _whitening(self) -> np.ndarray:
        """[D, D] after which typical offsets from the means have the length 1."""
        width = len(self.scale)
        values, vectors = np.linalg.eigh((1 - SHRINKAGE) * self.correlations + SHRINKAGE * np.eye(width))
        return np.asarray(vectors / np.sqrt(values * width))

    def distances(self, descriptors: np.ndarray, classes: np.ndarray | int = 0) -> np.ndarray:
        """[N] over the limits."""
        offsets = ((descriptors - self.means[classes]) / self.scale) @ self._whitening
        return np.asarray(np.linalg.norm(offsets, axis=-1) / self.limits[classes])

    def distance_of_mean(self, descriptors: np.ndarray) -> float:
        """The distance of the mean of what these descriptors are drawn from, in typical distances; two at least.

        Its square is the mean product of two different descriptors, which the spread of these few does not raise.
        """
        offsets, count = ((descriptors - self.means[0]) / self.scale) @ self._whitening, len(descriptors)
        square = (offsets.sum(0) ** 2).sum() - (offsets**2).sum()
        return math.sqrt(max(float(square), 0.0) / (count * (count - 1)))


@dataclass(frozen=True)
class Domain:
    pictures: Spread
    things: Spread | None  # None for labels without classes
    classes: tuple[str, ...]  # of the means of things but the last, which is that of all
    model: float = 0.0  # distance of what the model draws of the training captions, over the farthest; 0 is unknown

    def with_generated(self, sketches: np.ndarray, pictures: int, farthest: float = FARTHEST_MEAN) -> Domain:
        """The domain of so many pictures with the distance of its model, by sketches [N, D, h, w] of what that draws of
        their captions, beyond the distance that the mean of so few pictures has by chance.
        """
        chance = float(self.pictures.limits[0]) / MARGIN / math.sqrt(pictures)
        distance = self.pictures.distance_of_mean(sketches.mean((2, 3)))
        return replace(self, model=math.sqrt(max(distance**2 - chance**2, 0.0)) / farthest)

    def measure(self, sketch: np.ndarray, label: Annotation, is_drawn: bool = True) -> DomainDistance:
        """The distance of a picture by its sketch [D, h, w], of each class that its label shows, and of what the model
        draws, unless the picture was not drawn by it.
        """
        picture = float(self.pictures.distances(sketch.mean((1, 2))[None])[0])
        farthest: dict[str, float] = {}
        for name, descriptor in describe_things(sketch, label) if self.things else ():
            assert self.things
            place = self.classes.index(name) if name in self.classes else len(self.classes)
            distance = float(self.things.distances(descriptor[None], place)[0])
            farthest[name] = max(distance, farthest.get(name, 0.0))
        return DomainDistance(picture, farthest, self.model if is_drawn else 0.0)


def mixtures(channels: int) -> np.ndarray:
    """[M, C] orthogonal rows, the first of a cosine transform: channels have no order, so these are any mixtures."""
    rows, places = np.arange(min(MIXTURES, channels))[:, None], np.arange(channels)[None] + 0.5
    return np.cos(math.pi * rows * places / channels).astype(np.float32)


def describe_things(sketch: np.ndarray, label: Annotation) -> Iterator[tuple[str, np.ndarray]]:
    """Class and descriptor [D] of every region that a label gives a class."""
    cells, regions = sketch.shape[-1], list[tuple[str, np.ndarray]]()
    if isinstance(label, SemanticMap):
        regions = [(name, label.labels == k) for k, name in enumerate(label.classes) if name not in NO_THING]
    elif isinstance(label, Instances):
        chosen = zip(label.class_ids, label.scores, label.masks)
        regions = [(label.classes[k], mask) for k, score, mask in chosen if score >= SHOWN_SCORE]
    for name, mask in regions:
        if np.count_nonzero(mask) >= LEAST_SHARE * mask.size:
            rows, columns = (np.arange(cells + 1) * side // cells for side in mask.shape)
            sums = np.add.reduceat(np.add.reduceat(mask, rows[:-1], 0, dtype=np.float32), columns[:-1], 1)
            yield name, np.einsum("dhw,hw->d", sketch, sums) / sums.sum()


def learn_domain(sketches: np.ndarray, labels: Sequence[Annotation], pictures: Sequence[int]) -> Domain | None:
    """The domain of sketches [N, D, h, w] of labelled views of some `pictures`; None where these are too few."""
    of_picture, views = np.asarray(pictures), np.arange(len(sketches))
    whole = _fit(sketches.mean((2, 3)), of_picture, np.zeros(len(views), np.int64), 1, views, MARGIN)
    if whole is None:
        return None
    shown = [(view, *thing) for view, label in enumerate(labels) for thing in describe_things(sketches[view], label)]
    classes = tuple(sorted({name for _, name, _ in shown}))
    views = np.array([view for view, _, _ in shown], np.int64)
    numbers = np.array([classes.index(name) for _, name, _ in shown], np.int64)
    descriptors = np.array([descriptor for *_, descriptor in shown])
    things = _fit(descriptors, of_picture[views], numbers, len(classes) + 1, views, MARGIN_OF_THINGS)
    return Domain(whole, things, classes if things else ())


def _fit(
    descriptors: np.ndarray, pictures: np.ndarray, classes: np.ndarray, count: int, views: np.ndarray, margin: float
) -> Spread | None:
    """The spread of descriptors, with limits that 99 % of views keep to, as measured against other pictures; None where
    these are too few.
    """
    chosen, places = np.unique(pictures, return_inverse=True)
    if len(chosen) < LEAST_IMAGES:
        return None
    folds, held_out = places % FOLDS, np.zeros(len(descriptors))
    for fold in range(FOLDS):
        others = folds != fold
        inside = ~others & np.isin(classes, classes[others])
        spread = _spread(descriptors[others], pictures[others], classes[others], count)
        held_out[inside] = spread.distances(descriptors[inside], classes[inside])
    measured = held_out > 0
    if len(np.unique(pictures[measured])) < LEAST_IMAGES:
        return None
    farthest = np.array([held_out[views == view].max() for view in np.unique(views[measured])])
    logarithms = np.log(farthest)
    limit = max(float(np.exp(logarithms.mean() + QUANTILE * logarithms.std())), float(np.quantile(farthest, 0.99)))
    spread = _spread(descriptors, pictures, classes, count)
    return replace(spread, limits=margin * limit * spread.limits)


def _spread(descriptors: np.ndarray, pictures: np.ndarray, classes: np.ndarray, count: int) -> Spread:
    """The spread around the mean of each class, of all where none is of it. A mean of n pictures adds 1/n of their
    variance to the squared distance from it, so the limits are that of a mean that is known, 1, times sqrt(1 + 1/n).
    """
    means, shown = np.repeat(descriptors.mean(0)[None], count, 0), np.full(count, len(np.unique(pictures)))
    for k in np.unique(classes):
        means[k], shown[k] = descriptors[classes == k].mean(0), len(np.unique(pictures[classes == k]))
    residuals = descriptors - means[classes]
    scale = residuals.std(0) + 1e-6
    return Spread(means, scale, np.cov((residuals / scale).T), np.sqrt(1 + 1 / shown))


def write_domain(folder: Path, domain: Domain) -> None:
    """Writes a domain into the folder of its decoder."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    for part, spread in (("pictures", domain.pictures), ("things", domain.things)):
        if spread:
            arrays[f"{part}.means"] = spread.means.astype(np.float32)
            arrays[f"{part}.scale"] = spread.scale.astype(np.float32)
            arrays[f"{part}.correlations"] = spread.correlations[np.triu_indices(len(spread.scale))].astype(np.float16)
            arrays[f"{part}.limit"] = spread.limits.astype(np.float32)
    arrays["model"] = np.array(domain.model, np.float32)
    storage.publish({folder / FILE: save(arrays, {"classes": json.dumps(domain.classes)})})


def read_domain(folder: Path, width: int) -> Domain | None:
    """The domain of descriptors of this width in a decoder's folder, None where an earlier version trained it."""
    path = folder / FILE
    if not path.is_file():
        return None
    from safetensors import safe_open

    tensors.check_safetensors(path)
    with safe_open(path, "numpy") as file:
        arrays = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}
        names = documents.parse_json((file.metadata() or {}).get("classes", "[]"), f"{path}: classes")
    try:
        documents.check_form({"classes": names}, {"classes": [str]})
        pictures = _unpack(arrays, "pictures", 1, width)
        has_things = "things.means" in arrays
        things = _unpack(arrays, "things", len(names) + 1, width) if has_things else None
        model = float(arrays["model"].reshape(())) if "model" in arrays else 0.0
        if not 0 <= model < math.inf:
            raise ValueError(f"the distance of its model is {model}")
    except (KeyError, ValueError) as error:
        remedy = "Get the file again, or remove it: then no sample is judged by it."
        raise Refused(f"{path}: not the domain of this decoder ({error})", remedy) from None
    return Domain(pictures, things, tuple(names), model)


def _unpack(arrays: Mapping[str, np.ndarray], part: str, count: int, width: int) -> Spread:
    """The spread of `count` means of this width; a ValueError where the numbers of a file do not fit together."""
    means, scale, upper, limits = (arrays[f"{part}.{name}"] for name in ("means", "scale", "correlations", "limit"))
    shapes = means.shape, scale.shape
    if shapes != ((count, width), (width,)):
        raise ValueError(f"its tensors are {', '.join(map(str, shapes))}, expected {count} means of {width}")
    correlations = np.zeros((width, width))
    correlations[np.triu_indices(width)] = upper
    correlations += np.triu(correlations, 1).T
    finite = all(np.isfinite(values).all() for values in (means, scale, upper, limits))
    if not (finite and (scale > 0).all() and limits.min() > 0):
        raise ValueError("a value is NaN, infinite, or no spread")
    return Spread(means, scale, correlations, np.broadcast_to(limits, count))  # one limit in files of before
