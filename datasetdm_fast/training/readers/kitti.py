"""kitti:PATH[SPLIT]: KITTI depth with the Eigen lists, metres times 256 in 16-bit PNG."""

from pathlib import Path

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
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
