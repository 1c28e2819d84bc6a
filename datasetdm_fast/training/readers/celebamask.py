"""celebamask-hq:PATH[SPLIT]: CelebAMask-HQ, faces with one binary mask for each part of them."""

import re
from pathlib import Path

import numpy as np

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth.picture_source import PictureSource

PARTS = (  # in the order they are drawn, front ones last
    "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth"
).split()
NAMES = (
    "skin,nose,glasses,left eye,right eye,left eyebrow,right eyebrow,left ear,right ear,mouth,upper lip,lower lip,"
    "hair,hat,earring,necklace,neck,clothes"
).split(",")
IN_A_FOLDER = 2000  # images whose masks lie together
SPLITS = {"train": (0, 162_770), "val": (162_770, 182_637), "test": (182_637, 202_599)}  # numbers in CelebA
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"


class CelebAMask(PictureSource):
    """CelebA-HQ-img/N.jpg, CelebAMask-HQ-mask-anno/FOLDER/N_PART.png; splits are CelebA's, by the file that maps the
    images to their numbers there. Without that file, the split is all images.
    """

    classes = ("background", *NAMES)
    thing_classes = tuple(NAMES)
    rule = "voc"
    tasks = ("semantic", "open-vocabulary")

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.masks = reading.first_there(path / "CelebAMask-HQ-mask-anno")
        images = {}
        for image in reading.listing(path / "CelebA-HQ-img", ".jpg", ".png"):
            if not re.fullmatch(r"\d{1,6}", image.stem):
                raise reading.bad(image, "its name is no number")
            images[int(image.stem)] = image
        numbers = sorted(images)
        if (path / MAPPING).exists():
            if split not in SPLITS:
                raise reading.no_split(path, split)
            places = _celeba_numbers(path / MAPPING)
            numbers = [number for number in numbers if places.get(number, -1) in range(*SPLITS[split])]
        elif split != "train":
            raise reading.no_split(path, split)
        self.numbers, self.images = numbers, [images[number] for number in numbers]
        super().__init__(size, len(self.images))

    def picture(self, record: int) -> Picture:
        number, path = self.numbers[record], self.images[record]
        image = reading.colour_image(path)
        folder = self.masks / str(number // IN_A_FOLDER)
        masks = {k: folder / f"{number:05d}_{part}.png" for k, part in enumerate(PARTS, 1)}
        masks_found = {k: mask for k, mask in masks.items() if mask.exists()}
        if not masks_found:
            raise reading.bad(folder, f"no mask of the image {number}, expected for example {masks[1].name}")
        labels = np.zeros(image.shape[:2], np.uint8)
        for k, mask in masks_found.items():
            labels[reading.binary_mask(mask, image.shape, may_be_smaller=True)] = k
        return Picture(f"{number:05d}", image, "a photo of a face", labels)


def _celeba_numbers(path: Path) -> dict[int, int]:
    """Number in CelebA-HQ -> number in CelebA."""
    numbers = {}
    for number, line in reading.numbered_lines(path)[1:]:
        words = line.split()
        if len(words) < 2 or not all(word.isdecimal() and len(word) < 10 for word in words[:2]):
            raise reading.bad(path, f"line {number} is not the number of an image, its number in CelebA and its name")
        numbers[int(words[0])] = int(words[1])
    return numbers
