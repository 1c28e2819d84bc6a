"""Depth maps: a 16-bit PNG, in millimetres or in a larger unit where the farthest depth would not fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.data import DepthMap
from datasetdm_fast.engine.labels import LARGEST_STEP, GalleryLayer, Gates, LabelKind, Pixels, Table, round_float
from datasetdm_fast.engine.labels.label_files import with_text
from datasetdm_fast.engine.labels.pictures import depth_picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted.documents import quote

MILLIMETRES = 1000.0
UNITS = {"millimetre": MILLIMETRES, "1/256 metre": 256.0, "centimetre": 100.0, "metre": 1.0}  # name -> steps of a metre
DEFAULT_UNIT = "millimetre"  # of runs that name none


def unit_of(max_depth: float) -> str:
    """The finest unit in which 16 bits hold that many metres."""
    return next((unit for unit, steps in UNITS.items() if max_depth * steps <= LARGEST_STEP), "metre")


def depth_figures(pixels: np.ndarray, unit: str) -> dict[str, float]:
    """Nearest, mean and farthest depth of a map where it is known, in metres; 0 where it is known nowhere."""
    known = pixels if pixels.all() else pixels[pixels > 0]
    return _figures(known if len(known) else pixels, unit)


def _figures(pixels: np.ndarray, unit: str) -> dict[str, float]:
    return {
        name: round_float(value / UNITS[unit])
        for name, value in (("min", pixels.min()), ("mean", pixels.mean()), ("max", pixels.max()))
    }


def _unit(table: Table) -> str:
    unit: str = table.get("unit", DEFAULT_UNIT)
    if unit not in UNITS:
        raise Refused(f"run.json: labels.depth.unit is {quote(unit)}", f"Known units are {', '.join(UNITS)}.")
    return unit


class DepthKind(LabelKind):
    attribute = "depth"
    title = "Depth"
    contents = "`depth/ID.png`: 16-bit PNG, in the unit named below"
    roles = ("depth",)
    layers = (
        GalleryLayer(
            "depth",
            "Depth",
            "picture",
            role="depth",
            picture=depth_picture,
            values=lambda record, table, traced: [record["min"], record["max"]],
            unit="m",
        ),
    )
    gates = Gates(exact=(1e-4, 4e-4), free_exact=(1e-3, 1e-2), rounded=(5e-3, 2e-2), free_rounded=(2e-2, 0.1))
    table_form = {"max_depth": float}
    pixel_bytes = 3

    def encode(self, label: DepthMap, _: Mapping[str, Any], table: Table) -> tuple[dict[str, bytes], dict[str, Any]]:
        unit = _unit(table)
        pixels = np.multiply(label.metres, UNITS[unit], dtype=np.float64)
        pixels = np.clip(np.rint(pixels, out=pixels), 0, LARGEST_STEP, out=pixels).astype(np.uint16)
        file = with_text(_C.png_encode_words(pixels), "depth unit", unit)
        return {self.roles[0]: file}, depth_figures(pixels, unit)

    def decode(self, pixels: Pixels, _: Any, table: Table) -> DepthMap:
        return DepthMap((pixels[self.roles[0]] / UNITS[_unit(table)]).astype(np.float32), float(table["max_depth"]))

    def arrays(self, label: DepthMap, _: Table) -> np.ndarray:
        return label.metres

    def picture(self, label: DepthMap, _: np.ndarray) -> Image.Image:
        return depth_picture((label.metres * MILLIMETRES).astype(np.int32))

    def check(self, record: Any, pixels: Pixels, table: Table, _: tuple[int, int]) -> Iterator[str]:
        depths, unit = pixels[self.roles[0]], _unit(table)
        figures = depth_figures(depths, unit)
        if record not in (figures, _figures(depths, unit)):  # earlier versions counted what is not known as 0 m
            yield f"its depth map has {figures}, the ledger says {record}"

    def distance(self, predicted: DepthMap, truth: DepthMap) -> float:
        """Mean relative error where the depth is known, which it is not where a file has rounded it to 0."""
        known = truth.metres != 0
        errors = np.abs(predicted.metres - truth.metres)[known] / truth.metres[known]
        return float(errors.mean()) if errors.size else 0.0

    def follow_colours(self, label: DepthMap, image: np.ndarray) -> DepthMap:
        return replace(label, metres=_C.outlines_of_depth(label.metres, image))

    def merge(self, old: DepthMap, new: DepthMap, region: np.ndarray) -> DepthMap:
        return replace(old, metres=np.where(region, new.metres, old.metres))

    def figures(self, record: Any) -> dict[str, float]:
        return {"nearest, m": record["min"], "farthest, m": record["max"]}

    def steps(self, table: Table) -> float:
        return UNITS[_unit(table)]

    def table(self, config: Any, size: int, _: Sequence[str]) -> dict[str, Any]:
        return {"max_depth": config.max_depth, "unit": unit_of(config.max_depth)}

    def section(self, table: Table, counts: Mapping[Any, float]) -> Iterator[str]:
        unit = _unit(table)
        yield f"## {self.title}\n"
        yield f"The unit of a pixel is the {unit}: its value divided by {UNITS[unit]:g} is the distance in metres.\n"
