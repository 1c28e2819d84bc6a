"""Pictures of a caller of the library, in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasetdm_fast.engine.pictures import framing, reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class PicturesInMemory:
    """Pictures in memory, whose names are their places."""

    images: Sequence[np.ndarray]  # each [H, W, 3] uint8

    @property
    def names(self) -> list[str]:
        return [str(place) for place in range(len(self.images))]

    def whole(self, index: int) -> np.ndarray:  # [H, W, 3] uint8
        return self.images[index]

    def load(self, index: int, size: int) -> np.ndarray:  # [size, size, 3] uint8
        return crop_square(self.images[index], size)


def pictures_in_memory(images: Sequence[np.ndarray | Image]) -> PicturesInMemory:
    """Images of a caller, checked."""
    return PicturesInMemory([_pixels(image, place) for place, image in enumerate(images)])


def _pixels(image: np.ndarray | Image, place: int) -> np.ndarray:
    """The pixels of an image of a caller, checked."""
    import numpy as np

    pixels = _of_pillow(image, place) if hasattr(image, "getbands") else np.array(image)
    if pixels.dtype.kind in "OSU":
        raise Refused(
            f"image {place}: {image!r} is not an image", "Give an array of RGB in uint8, or an image of Pillow."
        )
    is_picture = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    if not is_picture or min(pixels.shape[:2]) < reading.LEAST_SIDE:
        raise Refused(
            f"image {place}: {pixels.dtype} of shape {list(pixels.shape)}, expected uint8 of shape [H, W, 3], sides of "
            f"at least {reading.LEAST_SIDE}",
            "Give an array of RGB in uint8, or an image of Pillow.",
        )
    return pixels


def _of_pillow(image: Image, place: int) -> np.ndarray:
    """An image of Pillow as viewers show it and as the pictures of a folder are read."""
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut off what is above 255
        raise Refused(
            f"image {place}: its pixels are {image.mode}, expected an 8-bit picture",
            "Scale its values to 0 to 255 first.",
        )
    try:
        image.load()
    except Exception as error:  # Pillow's readers raise nearly anything
        raise Refused(
            f"image {place}: it cannot be decoded ({documents.reason_of(error)})", "Get its file again."
        ) from error
    eight = image if image.mode in reading.COLOURS else image.convert("RGB")
    try:
        return reading.colours(f"image {place}", eight, reading.as_shown)
    except Refused as stop:
        raise Refused(stop.cause, "Give another image.") from stop


def crop_square(image: np.ndarray, size: int) -> np.ndarray:  # [size, size, 3] uint8
    """The largest square in the middle of an image [H, W, 3] uint8."""
    return framing.frame_picture(
        Picture("", image, ""), framing.fit_window(image.shape[0], image.shape[1], size), size
    ).image
