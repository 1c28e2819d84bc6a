"""Which samples and which of their pixels are doubtful: the one rule for run folders, trainings and the bench.

It reads classes only, never a name of the demo world: what the prompt names and a label lacks, things that a label
shows and the prompt does not name, pixels that two labels call by different names, and classes whose label map and
instances lie apart.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from datasetdm_fast.config import ATTENTION
from datasetdm_fast.data import IGNORE, Annotation, DomainDistance, Instances, SemanticMap, Trust
from datasetdm_fast.engine.labels import BACKGROUND, SHOWN_SCORE, LabelName
from datasetdm_fast.engine.labels.class_tables import ClassTable, count_named, find_classes
from datasetdm_fast.messages import count_noun

LEAST_SHARE = 1 / 250  # of the pixels: a class that fills less of a map is not shown
MOST_DISAGREEING = 0.1  # of the pixels of things
MOST_UNPROMPTED = 0.25  # of the pixels of things, as labels that are not held to the prompt show them
LEAST_UNPROMPTED = 0.8  # score of such an instance: decoders of few pictures are less sure without the prompt
LEAST_OVERLAP = 0.8  # IoU of a class in a label map and in the instances: chosen on seeds 0 to 499 of the demo model
NO_THING = frozenset(("", "none", "background"))


@dataclass(frozen=True)
class NamedMap:
    """Class names over the pixels of an image; whatever has no number in `names` is unknown."""

    numbers: np.ndarray  # [H, W], place in `names`
    names: tuple[str, ...]

    def shares(self) -> dict[str, float]:
        """Share of the pixels of each class."""
        counts = np.bincount(self.numbers.ravel(), minlength=len(self.names))[: len(self.names)]
        return {name: count / self.numbers.size for name, count in zip(self.names, counts.tolist()) if count}

    def numbers_in(self, order: Mapping[str, int]) -> np.ndarray:
        """[H, W] the numbers of `order`, 0 for every other class."""
        numbers = np.zeros(max(int(self.numbers.max(initial=0)) + 1, len(self.names)), np.uint16)
        numbers[: len(self.names)] = [order.get(name, 0) for name in self.names]
        return np.asarray(numbers[self.numbers])


def named_map(label: Annotation, least: float = SHOWN_SCORE) -> NamedMap | None:
    """The classes over the pixels of a label, of two instances the surer one's, if it has the `least` score; None where
    it names none.
    """
    if isinstance(label, SemanticMap):
        return NamedMap(label.labels, label.classes)
    if isinstance(label, Instances):
        numbers = np.zeros(label.masks.shape[1:], np.uint16)
        for k in np.argsort(label.scores, kind="stable"):
            if label.scores[k] >= least:
                numbers[label.masks[k]] = label.class_ids[k] + 1
        return NamedMap(numbers, ("", *label.classes))
    return None


def trust_of(
    named: Sequence[str], labels: Mapping[str, Annotation], prompt: str = "", table: ClassTable | None = None
) -> Trust:
    """How far labels can be trusted by the `named` classes of their prompt, whose text may name further ones."""
    maps = {task: shown_map for task, label in labels.items() if (shown_map := named_map(label))}
    shares = {task: shown_map.shares() for task, shown_map in maps.items()}
    reasons: list[str] = []
    missing: list[str] = []
    unnamed: list[str] = []
    for name in named:
        tasks = [task for task in maps if name in maps[task].names and shares[task].get(name, 0) < LEAST_SHARE]
        if tasks:
            missing.append(name)
            places = " or ".join(f"{task}{_faintly(labels[task], name)}" for task in tasks)
            reasons.append(f"{name} is in the prompt, but not in {places}")
    for name in sorted(_foreign(named, labels, prompt, table)):
        if shown := [task for task, by_name in shares.items() if by_name.get(name, 0) >= LEAST_SHARE]:
            unnamed.append(name)
            reasons.append(f"{name} is in {' and '.join(shown)}, but not in the prompt")
    reasons += _count_mismatches(named, labels, prompt, table)
    confidences = []  # of the decoders that tell how sure they are
    for label in labels.values():
        sure = np.asarray(label.confidence if isinstance(label, SemanticMap) else getattr(label, "scores", ()))
        if len(sure):
            confidences.append(float(sure.mean()))
    confidence = round(sum(confidences) / len(confidences), 4) if confidences else None
    disagreeing = _disagreeing(maps) if len(maps) > 1 else 0.0
    if disagreeing > MOST_DISAGREEING:
        reasons.append(f"{disagreeing:.0%} of the pixels of things have two names")
    elif len(maps) > 1:
        reasons += _apart([name for name in named if name not in missing], maps)
    return Trust(tuple(missing), tuple(unnamed), round(disagreeing, 4), confidence, tuple(reasons))


def with_domain(trust: Trust, distances: Mapping[str, DomainDistance]) -> Trust:
    """A trust with the largest distance from its decoders' domains, and first what is out of them."""
    models = {task: each.model for task, each in distances.items() if each.model > 1}
    farthest = max(*(max(each.picture, *each.things.values(), 0.0) for each in distances.values()), *models.values(), 0)
    reasons = []
    if models:
        reasons.append(f"the model does not draw what {' and '.join(models)} learned from")
    if tasks := [task for task, each in distances.items() if each.picture > 1]:
        reasons.append(f"the picture is unlike those that {' and '.join(tasks)} learned from")
    else:
        for task, each in distances.items():
            reasons += [
                f"{name} in {task} is unlike those in the pictures it learned from"
                for name, distance in each.things.items()
                if distance > 1
            ]
    return replace(trust, domain=round(farthest, 3), reasons=(*reasons, *trust.reasons))


def with_undrawn(trust: Trust, named: Sequence[str], prompt: str, draws: Sequence[str]) -> Trust:
    """A trust with what a prompt or its classes name that the model cannot draw, whose card lists what it can."""
    listed = f"the model draws {', '.join(draws)} alone"
    reasons = [f"{listed}, not {word}" for word in named if not find_classes(word, draws)]
    if not find_classes(prompt, draws):
        reasons.append(f"{listed}, and the prompt names none of these")
    return replace(trust, reasons=(*reasons, *trust.reasons))


def with_unprompted(
    trust: Trust, named: Sequence[str], labels: Mapping[str, Annotation], prompt: str, table: ClassTable | None = None
) -> Trust:
    """A trust with what labels that are not held to the prompt show in its stead, where label map and instances agree
    and are sure: decoders of few pictures tell little without the prompt.
    """
    foreign = sorted(_foreign(named, labels, prompt, table))
    if not foreign:
        return trust
    order = {name: k for k, name in enumerate((*foreign, *named), 1)}
    shown = [named_map(label, LEAST_UNPROMPTED) for label in labels.values()]
    numbers = np.stack([each.numbers_in(order) for each in shown if each])
    things = max(int(np.count_nonzero(numbers.any(0))), 1)
    agreed = np.where((numbers == numbers[0]).all(0), numbers[0], 0)
    areas = {name: np.count_nonzero(agreed == order[name]) / things for name in foreign}
    share = sum(areas.values())
    if share <= MOST_UNPROMPTED:
        return trust
    others = " and ".join(name for name in foreign if areas[name] >= MOST_UNPROMPTED / 2) or "others"
    reason = f"without the prompt, {share:.0%} of the pixels of things are {others}, which it does not name"
    return replace(trust, reasons=(*trust.reasons, reason))


def _apart(named: Sequence[str], maps: Mapping[str, NamedMap]) -> Iterator[str]:
    """Which of these classes lie elsewhere in a label map than in the instances, in words."""
    by_task = {task: [name for name in maps if LabelName.parse(name).task == task] for task in ("semantic", "instance")}
    for first, second in product(by_task["semantic"], by_task["instance"]):
        for name in named:
            if name in maps[first].names and name in maps[second].names:
                first_mask, second_mask = (maps[label].numbers_in({name: 1}) > 0 for label in (first, second))
                overlap = np.count_nonzero(first_mask & second_mask) / np.count_nonzero(first_mask | second_mask)
                if overlap < LEAST_OVERLAP:
                    yield f"{name} in {first} overlaps {name} in {second} with an IoU of {overlap:.2f}"


def _count_mismatches(
    named: Sequence[str], labels: Mapping[str, Annotation], prompt: str, table: ClassTable | None
) -> Iterator[str]:
    """Which of the named classes have more or fewer instances than the prompt names things, in words."""
    for task, label in labels.items():
        if not isinstance(label, Instances):
            continue
        shown = label.class_ids[label.scores >= SHOWN_SCORE].tolist()
        for name, count in count_named(prompt, label.classes, table).items():
            instances = shown.count(label.classes.index(name))
            if name in named and instances not in (0, count):
                yield f"{task} has {count_noun(instances, 'instance')} of {name}, the prompt names {count}"


def _faintly(label: Annotation, name: str) -> str:
    """Why instances of a class that are there do not count, in words."""
    if not isinstance(label, Instances):
        return ""
    scores = label.scores[label.class_ids == label.classes.index(name)]
    is_faint = len(scores) > 0 and scores.max() < SHOWN_SCORE
    return f" (its score {scores.max():.2f} is below {SHOWN_SCORE})" if is_faint else ""


def _foreign(named: Sequence[str], labels: Mapping[str, Annotation], prompt: str, table: ClassTable | None) -> set[str]:
    """Things that a prompt does not name, where it names any: the classes of instances are things."""
    things = {name for label in labels.values() if isinstance(label, Instances) for name in label.classes}
    return things.difference(named, find_classes(prompt, sorted(things), table)) if things & set(named) else set()


def pairs(maps: Iterable[NamedMap]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two maps of things in the same numbers, for all pairs of maps that share a name."""
    for first, second in combinations(maps, 2):
        order = {name: k for k, name in enumerate(sorted({*first.names} & {*second.names} - NO_THING), 1)}
        if order:
            yield first.numbers_in(order), second.numbers_in(order)


def _disagreeing(maps: Mapping[str, NamedMap]) -> float:
    """Share of the pixels of things that two maps call by different names; 0 where there is none."""
    differing = named = 0
    for first, second in pairs(maps.values()):
        both = (first > 0) & (second > 0)
        differing += int(np.count_nonzero(both & (first != second)))
        named += int(np.count_nonzero((first > 0) | (second > 0)))
    return differing / named if named else 0.0


def without_unsure(labels: Mapping[str, Annotation], least: float) -> dict[str, Annotation]:
    """The labels with IGNORE in their maps of classes where the confidence is below `least`; what attention gives no
    class keeps its background, as the confidence there is that of the classes.
    """
    cleaned = dict(labels)
    for task, label in labels.items():
        if isinstance(label, SemanticMap):
            unsure = label.confidence < least
            if task == ATTENTION:
                unsure &= label.labels != label.classes.index(BACKGROUND)
            cleaned[task] = replace(label, labels=np.where(unsure, IGNORE, label.labels).astype(np.uint8))
    return cleaned


def without_doubtful(
    named: Sequence[str], labels: Mapping[str, Annotation], prompt: str = "", table: ClassTable | None = None
) -> dict[str, Annotation]:
    """The labels with IGNORE in their maps of classes where two differ, or a thing is not named by the prompt."""
    maps = {task: shown_map for task, label in labels.items() if (shown_map := named_map(label))}
    foreign, cleaned = _foreign(named, labels, prompt, table), dict(labels)
    for task in maps:
        label = labels[task]
        if not isinstance(label, SemanticMap):
            continue
        doubtful = np.isin(label.labels, [k for k, name in enumerate(label.classes) if name in foreign])
        for other in maps:
            for first, second in pairs((maps[task], maps[other])) if other != task else ():
                doubtful |= (first > 0) & (second > 0) & (first != second)
        cleaned[task] = replace(label, labels=np.where(doubtful, IGNORE, label.labels).astype(np.uint8))
    return cleaned
