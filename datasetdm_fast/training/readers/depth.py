"""nyu:PATH[SPLIT]: NYU Depth v2 as the depth benchmarks lay it out, millimetres in 16-bit PNG; kitti:PATH[SPLIT]: KITTI
depth with the Eigen lists, metres times 256; vkitti2:PATH[SCENES]: Virtual KITTI 2, centimetres, SCENES such as
Scene01,Scene20, or all of them.
"""

import re
from pathlib import Path

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth.picture_source import PictureSource

NYU_FOLDERS = {"train": ("sync",), "test": ("official_splits/test", "official_splits", "")}
RECORDING = re.compile(r"(.+_\d+)[a-z]*")  # of several of a scene: kitchen_0004a, kitchen_0004b
CAPTION = "a photo of a street"
SCENE = re.compile(r"Scene\d+")


def _stem(name: str) -> str:
    return name.removesuffix(Path(name).suffix).replace("/", "_")


class Nyu(PictureSource):
    """train_list.txt and test_list.txt name images and depths; val is test where it has no list of its own."""

    max_depth = 10.0  # metres
    tasks = ("depth",)
    rule = "nyu"

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        split = "test" if split == "val" and not (path / "val_list.txt").exists() else split
        self.list = path / f"{split}_list.txt"
        folders = NYU_FOLDERS.get(split, (f"official_splits/{split}", split))
        self.folder = reading.first_there(*(path / folder for folder in folders))
        self.rows = [(name.lstrip("/"), depth.lstrip("/")) for name, depth in reading.pairs(self.list)]
        self.images = [self.folder / name for name, _ in self.rows]
        super().__init__(size, len(self.rows))

    def sequence(self, record: int) -> str:
        """The numbered scene without the letter of its part; images of the test split have no number there."""
        scene = RECORDING.fullmatch(Path(self.rows[record][0]).parent.name)
        return scene[1] if scene else ""

    def picture(self, record: int) -> Picture:
        name, depth = self.rows[record]
        image = reading.colour_image(reading.inside(self.folder, name, self.list))
        metres = reading.depth_map(reading.inside(self.folder, depth, self.list), image.shape, 1000, self.max_depth)
        place = re.sub(r"_\d+\w*$", "", Path(name).parent.name).replace("_", " ").strip()
        return Picture(_stem(name), image, f"a photo of a {place or 'room'}", depth=metres)


class Kitti(PictureSource):
    """input, gt_depth and kitti_eigen_SPLIT.txt, whose lines name image and depth; lines without depth are left
    out; val is test where it has no list of its own.
    """

    max_depth = 80.0
    tasks = ("depth",)
    rule = "kitti"

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path = path
        split = "test" if split == "val" and not (path / "kitti_eigen_val.txt").exists() else split
        self.list = path / f"kitti_eigen_{split}.txt"
        self.rows = reading.pairs(self.list)
        self.images = [path / "input" / name for name, _ in self.rows]
        super().__init__(size, len(self.rows))

    def sequence(self, record: int) -> str:
        """The drive, which has frames of two cameras."""
        return next((part for part in Path(self.rows[record][0]).parts if "_drive_" in part), "")

    def picture(self, record: int) -> Picture:
        name, depth = self.rows[record]
        image = reading.colour_image(reading.inside(self.path / "input", name, self.list))
        file = reading.inside(self.path / "gt_depth", depth, self.list)
        metres = reading.depth_map(file, image.shape, 256, self.max_depth)
        return Picture(_stem(name), image, CAPTION, depth=metres)


class VirtualKitti(PictureSource):
    """Image/Scene*/.../rgb/... beside Depth/Scene*/.../depth/..., or both in one folder; beyond 80 m is unknown.

    Metres are the file's centimetres; upstream stretches the sensor's 655 m to its 80 instead.
    """

    max_depth = 80.0
    tasks = ("depth",)
    rule = "vkitti2"

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        root, self.depths = (path / "Image", path / "Depth") if (path / "Image").is_dir() else (path, path)
        below = [image.relative_to(root) for image in reading.listing(root, ".jpg")]
        scenes = [] if split == "train" else split.split(",")
        if absent := [scene for scene in scenes if not (root / scene).is_dir()]:
            raise Refused(
                f"{root}: no scene {absent[0]!r}", "Name scenes as their folders are called, or none for all."
            )
        self.rows = [name for name in below if "rgb" in name.parts and (not scenes or name.parts[0] in scenes)]
        if not self.rows:
            raise Refused(
                f"{root}: no image below a folder rgb", "Give the folder that holds Scene01, Scene02 and so on."
            )
        inside = [part for part in root.absolute().parts[-2:] if SCENE.fullmatch(part)]  # or a weather of it
        self.scene = inside[-1] if inside else ""
        self.images = [root / name for name in self.rows]
        super().__init__(size, len(self.rows))

    def origins(self, record: int) -> tuple[str, ...]:
        """The frame of a scene, which is there from both cameras and in every weather."""
        name = self.rows[record]
        return (f"{self.sequence(record)}/{name.name}",)

    def sequence(self, record: int) -> str:
        return self.scene or self.rows[record].parts[0]

    def picture(self, record: int) -> Picture:
        name = self.rows[record]
        image = reading.colour_image(self.images[record])
        depth = str(name).replace("rgb", "depth").removesuffix(".jpg") + ".png"
        metres = reading.depth_map(self.depths / depth, image.shape, 100, self.max_depth)
        return Picture(_stem(str(name)), image, CAPTION, depth=metres)
