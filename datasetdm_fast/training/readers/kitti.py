"""kitti:PATH[SPLIT]: KITTI depth with the Eigen lists, metres times 256 in 16-bit PNG; vkitti2:PATH[SCENES]: Virtual
KITTI 2, centimetres in 16-bit PNG; SCENES such as Scene01,Scene20, or all of them.
"""

import re
from pathlib import Path

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth import windows
from datasetdm_fast.training.truth.picture_source import PictureSource

CAPTION = "a photo of a street"


class Kitti(PictureSource):
    """input, gt_depth and kitti_eigen_SPLIT.txt, whose lines name image and depth; lines without depth are left
    out; val is test where it has no list of its own.
    """

    max_depth = 80.0
    tasks = ("depth",)
    rule = windows.RULES["kitti"]

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
        metres = reading.depth_map(
            reading.inside(self.path / "gt_depth", depth, self.list), image.shape, 256, self.max_depth
        )
        return Picture(name.removesuffix(Path(name).suffix).replace("/", "_"), image, CAPTION, depth=metres)


SCENE = re.compile(r"Scene\d+")


class VirtualKitti(PictureSource):
    """Image/Scene*/.../rgb/... beside Depth/Scene*/.../depth/..., or both in one folder; beyond 80 m is unknown.

    Metres are the file's centimetres; upstream stretches the sensor's 655 m to its 80 instead.
    """

    max_depth = 80.0
    tasks = ("depth",)
    rule = windows.RULES["vkitti2"]

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path = path
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
        return Picture(str(name.with_suffix("")).replace("/", "_"), image, CAPTION, depth=metres)
