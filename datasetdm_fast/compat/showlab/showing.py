"""DatasetDM's vis scripts: the first images of an output with their labels drawn over them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from datasetdm_fast.compat.showlab import drawing
from datasetdm_fast.compat.showlab.checkout import present
from datasetdm_fast.compat.showlab.files import KITTI_STEPS, MILLIMETRES, encoded
from datasetdm_fast.compat.showlab.lines import Flag, Line
from datasetdm_fast.compat.showlab.splicing import HOLDER, contours_in
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.pictures import masked
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import images

LEAST_SCORE = 0.6  # of an instance that is drawn
ROOM_STEPS = 256  # of a file of rooms, at the end of the colours
STREET_STEPS = 128  # and of streets
FARTHEST_IN_ROOMS, FARTHEST_IN_STREETS = 10, 40  # metres there


@dataclass(frozen=True)
class Shower:
    """A script that shows the labels of one kind of output."""

    name: str
    source: str  # folder that DatasetDM's script names
    first: int  # images that are shown
    draw: Callable[[np.ndarray, Path], Image.Image]
    folder: str = "Mask"
    suffix: str = ".png"
    is_beside: bool = False  # whether image_NAME.jpg, the image itself, lies beside its drawing

    @property
    def told(self) -> str:
        return f"The first {self.first} images of an output with their labels drawn over them, in DataDiffusion/Vis."

    @property
    def flags(self) -> tuple[Flag, ...]:
        return (
            Flag("root", ".", help="checkout of DatasetDM, which holds DataDiffusion"),
            Flag("input_root", self.source, help="folder in DataDiffusion with the images"),
            Flag("out_root", "Vis", help="folder in DataDiffusion to write"),
            Flag("quiet", False, "switch", "say nothing on stderr"),
        )


def _map_over(palette: str, alpha: float) -> Callable[[np.ndarray, Path], Image.Image]:
    def draw(pixels: np.ndarray, label: Path) -> Image.Image:
        labels = np.array(images.read_image(label))
        return drawing.over(pixels, labels[..., 0] if labels.ndim == 3 else labels, palette, alpha)

    return draw


def _room(pixels: np.ndarray, label: Path) -> Image.Image:
    return Image.fromarray(drawing.jet(_depth(label, ROOM_STEPS, MILLIMETRES * FARTHEST_IN_ROOMS)))


def _street(pixels: np.ndarray, label: Path) -> Image.Image:
    return Image.fromarray(drawing.near_to_far(_depth(label, STREET_STEPS, KITTI_STEPS * FARTHEST_IN_STREETS)))


def _depth(label: Path, steps: int, fine_steps: int) -> np.ndarray:
    """Depth as a share of that at the end of the colours: so many steps of a file of 8 bits, or of 16 bits, which the
    generators write with --fixed.
    """
    picture = images.read_image(label)
    plane = np.array(picture).astype(np.float32) / (fine_steps if picture.mode.startswith("I") else steps)
    return plane[..., 0] if plane.ndim == 3 else plane


def _contours(pixels: np.ndarray, label: Path) -> Image.Image:
    shown = [contour for contour in contours_in(label) if contour.score >= LEAST_SCORE]
    masks = [drawing.filled(pixels.shape[:2], contour.places.reshape(-1).tolist()) for contour in shown]
    classes = [contour.number for contour in shown]
    return masked(pixels, np.array(masks, bool).reshape(-1, *pixels.shape[:2]), np.array(classes, int))


_VOC_RUN = "Train_10_images_t1_attention_transformer_VOC_10layers_ablation_200images"
SHOWERS = {
    each.name: each
    for each in (
        Shower("vis_VOC", _VOC_RUN, 300, _map_over("voc", 0.5)),
        Shower("vis_Cityscapes", "Cityscapes_Train_19_images_t1", 100, _map_over("cityscapes", 0.5)),
        Shower("vis_deepfashion_MM", "DeepFashion_MM_Train_105_images_t1", 100, _map_over("deepfashion", 0.6)),
        Shower("vis_COCO", "COCO_Train_10_images_t1_10layers_NoClass", 200, _contours, suffix=".txt"),
        Shower("vis_NYU", "NYU_Train_250_images_t1", 100, _room, "Annotation", is_beside=True),
        Shower("vis_KITTI", "KITTI_Train_50_images_t1", 20, _street, "Annotation", is_beside=True),
    )
}


def show(shower: Shower, line: Line) -> tuple[Path, int]:
    """Draws the first images that have a label: the output, and how many there are."""
    source, out = (line.root / HOLDER / line[name] for name in ("input_root", "out_root"))
    present(source / "Image", "--input_root", "Generate the images first.")
    if out.resolve() == (source / "Image").resolve():
        raise Refused(f"--out_root {line['out_root']}: the images themselves are there", "Name another folder.")
    pairs = [
        (path, source / shower.folder / f"{path.stem}{shower.suffix}") for path in (source / "Image").glob("*.jpg")
    ]
    shown = [pair for pair in sorted(pairs) if pair[1].is_file()][: shower.first]
    for path, label in shown:
        pixels = np.array(images.read_image(path).convert("RGB"))
        made = {out / path.name: shower.draw(pixels, label).convert("RGB")}
        if shower.is_beside:
            made[out / f"image_{path.name}"] = Image.fromarray(pixels)
        storage.publish({name: encoded(picture, "JPEG", quality=95) for name, picture in made.items()})
    return out, len(shown)
