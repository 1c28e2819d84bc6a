"""What the nets of bench.world.judge see in a picture, thing by thing, beside the things its caption names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from datasetdm_fast.engine.scenes.world import TableTop

ENOUGH = 100  # pixels of 128 x 128 that count as seen
MIXED = 0.3  # share of a region's pixels from which a second colour is a second thing


@dataclass(frozen=True)
class SeenThing:
    kind: str
    colour: str
    x: float  # mean column of its pixels


def things_seen(
    classes: np.ndarray, colours: np.ndarray, names: Sequence[str], colour_names: Sequence[str]
) -> list[SeenThing]:
    """The things of a picture from left to right: connected pixels of a kind, in parts where they have several colours.

    `classes` [H, W] numbers `names`, of which the first two are wall and table; `colours` [H, W] numbers
    `colour_names` from 1 on, 0 is no thing.
    """
    found = []
    for number in range(2, len(names)):
        regions, count = ndimage.label(classes == number)
        for region in range(1, count + 1):
            inside = regions == region
            if inside.sum() < ENOUGH:
                continue
            pixels = np.bincount(colours[inside], minlength=len(colour_names) + 1)
            pixels[0] = 0
            own = [k for k in np.flatnonzero(pixels >= ENOUGH) if pixels[k] >= MIXED * pixels.sum()]
            for k in own or [int(pixels.argmax())]:
                shown = inside & (colours == k) if len(own) > 1 else inside
                colour = colour_names[k - 1] if k else ""
                found.append(SeenThing(names[number], colour, float(np.nonzero(shown)[1].mean())))
    return sorted(found, key=lambda thing: thing.x)


def follows(things: Sequence[SeenThing], scene: TableTop) -> dict[str, bool]:
    """Whether the things that the caption names are there, in their colours and their order, and as many are seen."""
    asked, seen = [(one.kind, one.colour) for one in scene.things], [(one.kind, one.colour) for one in things]
    rest = iter(seen)
    return {
        "things": not Counter(kind for kind, _ in asked) - Counter(kind for kind, _ in seen),
        "colours": not Counter(asked) - Counter(seen),
        "order": all(one in rest for one in asked),
        "number": len(seen) == len(asked),
    }


def shares(pictures: Sequence[Sequence[SeenThing]], scenes: Sequence[TableTop]) -> dict[int, dict[str, float]]:
    """For each number of things that captions name, the share of pictures of which each of `follows` is true."""
    rows: dict[int, list[dict[str, bool]]] = {}
    for things, scene in zip(pictures, scenes, strict=True):
        rows.setdefault(len(scene.things), []).append(follows(things, scene))
    return {
        count: {name: round(float(np.mean([row[name] for row in some])), 4) for name in some[0]}
        for count, some in sorted(rows.items())
    }
