"""nyu:PATH[SPLIT]: NYU Depth v2 as the depth benchmarks lay it out, millimetres in 16-bit PNG."""

import re
from pathlib import Path

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth import windows
from datasetdm_fast.training.truth.picture_source import PictureSource

FOLDERS = {"train": ("sync",), "test": ("official_splits/test", "official_splits", "")}
SCENE = re.compile(r"(.+_\d+)[a-z]*")  # of several recordings: kitchen_0004a, kitchen_0004b


class Nyu(PictureSource):
    """train_list.txt and test_list.txt name images and depths; val is test where it has no list of its own."""

    max_depth = 10.0  # metres
    tasks = ("depth",)
    rule = windows.RULES["nyu"]

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        split = "test" if split == "val" and not (path / "val_list.txt").exists() else split
        self.list = path / f"{split}_list.txt"
        folders = FOLDERS.get(split, (f"official_splits/{split}", split))
        self.folder = reading.first_there(*(path / folder for folder in folders))
        self.rows = [(name.lstrip("/"), depth.lstrip("/")) for name, depth in reading.pairs(self.list)]
        self.images = [self.folder / name for name, _ in self.rows]
        super().__init__(size, len(self.rows))

    def sequence(self, record: int) -> str:
        """The numbered scene without the letter of its part; images of the test split have no number there."""
        scene = SCENE.fullmatch(Path(self.rows[record][0]).parent.name)
        return scene[1] if scene else ""

    def picture(self, record: int) -> Picture:
        name, depth = self.rows[record]
        image = reading.colour_image(reading.inside(self.folder, name, self.list))
        metres = reading.depth_map(reading.inside(self.folder, depth, self.list), image.shape, 1000, self.max_depth)
        place = re.sub(r"_\d+\w*$", "", Path(name).parent.name).replace("_", " ").strip()
        return Picture(
            name.removesuffix(Path(name).suffix).replace("/", "_"),
            image,
            f"a photo of a {place or 'room'}",
            depth=metres,
        )
