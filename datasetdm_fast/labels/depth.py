"""Depth maps: a 16-bit PNG of millimetres."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from datasetdm_fast import _C
from datasetdm_fast.data import DepthMap
from datasetdm_fast.labels.kind import GalleryLayer, Gates, LabelKind, Pixels, Table, rounded
from datasetdm_fast.labels.pictures import depth_picture

MILLIMETRES = 1000.0


def depth_figures(millimetres: np.ndarray) -> dict[str, float]:
    """Nearest, mean and farthest depth of a map, in metres."""
    return {
        name: rounded(value / MILLIMETRES)
        for name, value in (("min", millimetres.min()), ("mean", millimetres.mean()), ("max", millimetres.max()))
    }


class DepthKind(LabelKind):
    attribute = "depth"
    contents = "`depth/ID.png`: 16-bit PNG, millimetres"
    roles = ("depth",)
    layers = (
        GalleryLayer(
            "depth",
            "Depth",
            "picture",
            role="depth",
            picture=depth_picture,
            values=lambda record, table: [record["min"], record["max"]],
            unit="m",
        ),
    )
    gates = Gates(exact=(1e-4, 4e-4), free_exact=(1e-3, 1e-2), rounded=(5e-3, 2e-2), free_rounded=(2e-2, 0.1))
    table_form = {"max_depth": float}
    pixel_bytes = 3

    def encode(self, label: DepthMap, _: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
        millimetres = np.multiply(label.metres, MILLIMETRES, dtype=np.float64)
        millimetres = np.clip(np.rint(millimetres, out=millimetres), 0, 65535, out=millimetres).astype(np.uint16)
        return {self.roles[0]: _C.png_encode_words(millimetres)}, depth_figures(millimetres)

    def decode(self, pixels: Pixels, _: Any, table: Table) -> DepthMap:
        return DepthMap((pixels[self.roles[0]] / MILLIMETRES).astype(np.float32), float(table["max_depth"]))

    def arrays(self, label: DepthMap) -> np.ndarray:
        return label.metres

    def picture(self, label: DepthMap, _: np.ndarray) -> Image.Image:
        return depth_picture((label.metres * MILLIMETRES).astype(np.int32))

    def check(self, record: Any, pixels: Pixels, table: Table, _: tuple[int, int]) -> Iterator[str]:
        figures = depth_figures(pixels[self.roles[0]])
        if record != figures:
            yield f"its depth map has {figures}, the ledger says {record}"

    def distance(self, found: DepthMap, truth: DepthMap) -> float:
        """Mean relative error."""
        return float((np.abs(found.metres - truth.metres) / np.maximum(truth.metres, 1e-6)).mean())

    def table(self, config: Any, size: int, _: Sequence[str]) -> dict[str, Any]:
        return {"max_depth": config.max_depth, "unit": "millimetre"}
