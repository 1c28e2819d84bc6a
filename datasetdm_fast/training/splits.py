"""Splits of the labelled images: those held out from a training, and the folds of a cross-validation."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from datasetdm_fast.engine.pictures.labelled import LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_folder.selections import groups

LEAST_IMAGES = 10  # images below which none is held out
AUTO_FOLDS = 5  # of `--folds auto`
ENOUGH_IMAGES = 30  # held-out images below which no step is chosen by a figure, and figures carry a warning


def split(source: LabelledSource, numbers: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """The item numbers to train on, and those held out, both in their order. Items made of one picture are on the same
    side. So are the frames of a sequence, unless none could be held out then.
    """
    count = len(numbers)
    most = min(max(round(share * count), 1), count - 1) if share and count >= LEAST_IMAGES else 0
    held: set[int] = set()
    for origins in (source.filmed_in, source.made_of) if most else ():
        held = held or _choose_groups(numbers, _group(numbers, origins), most, seed)
    return [number for number in numbers if number not in held], [number for number in numbers if number in held]


def _choose_groups(numbers: Sequence[int], members: Mapping[int, Sequence[int]], most: int, seed: int) -> set[int]:
    """The items held out: whole groups of `most` items together, or else the smallest group, if it is no more than half
    of all.
    """
    count, held = len(numbers), set[int]()
    group_of = {number: group for group in members.values() for number in group}
    for place in np.random.default_rng([seed, count]).permutation(count).tolist():
        group = group_of[numbers[place]]
        if numbers[place] not in held and len(held) + len(group) <= most:
            held.update(group)
    if not held and 2 * len(smallest := min(members.values(), key=len)) <= count:
        held.update(smallest)
    return held


def count_folds(requested: str, source: LabelledSource, numbers: Sequence[int], held_out: int) -> int:
    """The number of folds of --folds; `auto` gives five where the held-out images are too few for a figure, or as many
    as there are images that were not made of one picture.
    """
    images = len(numbers)
    if requested == "no":
        return 0
    if requested == "auto":
        is_useful = not are_enough(held_out) and images >= LEAST_IMAGES
        unrelated = count_unrelated(source, numbers) if is_useful else 0
        return min(AUTO_FOLDS, unrelated) if unrelated > 1 else 0
    if int(requested) > images:
        raise Refused(
            f"--folds: {requested} folds of {count_noun(images, 'image')}",
            "Ask for no more folds than there are images.",
        )
    return int(requested)


def split_folds(source: LabelledSource, numbers: Sequence[int], folds: int, seed: int) -> list[list[int]]:
    """The item numbers of each fold, of nearly equal size. Items made of one picture are in the same fold; so are the
    frames of a sequence where there are as many sequences as folds.
    """
    members = group_related(source, numbers, folds)
    parts: list[list[int]] = [[] for _ in range(folds)]
    for group in np.random.default_rng([seed, folds, len(numbers)]).permutation(sorted(members)).tolist():
        min(parts, key=len).extend(members[group])
    if not all(parts):
        raise Refused(
            f"--folds: {folds} folds of {count_noun(len(members), 'picture')}", "Ask for no more folds than pictures."
        )
    return [sorted(fold) for fold in parts]


def group_related(source: LabelledSource, numbers: Sequence[int], least: int) -> dict[int, list[int]]:
    """The item numbers that share a picture that they were made of, or a sequence where there are `least` groups then,
    by the number of their group.
    """
    members = _group(numbers, source.filmed_in)
    return members if len(members) >= least else _group(numbers, source.made_of)


def _group(numbers: Sequence[int], origins: Callable[[int], tuple[str, ...]]) -> dict[int, list[int]]:
    """Item numbers by the number of their group, whose items share an origin."""
    members = defaultdict(list)
    for number, group in zip(numbers, groups([origins(number) for number in numbers])):
        members[group].append(number)
    return members


def count_unrelated(source: LabelledSource, numbers: Sequence[int]) -> int:
    """How many groups of items share no picture that they were made of: the most folds that can be made of them."""
    return len(set(groups([source.made_of(number) for number in numbers])))


def are_enough(images: int) -> bool:
    """Whether a figure on so many images is reliable enough to choose weights by."""
    return images >= ENOUGH_IMAGES
