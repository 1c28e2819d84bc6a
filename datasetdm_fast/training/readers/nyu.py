"""nyu:PATH[SPLIT]: NYU Depth v2 as the depth benchmarks lay it out, millimetres in 16-bit PNG."""

import re
from pathlib import Path

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth import windows
from datasetdm_fast.training.truth.picture_source import PictureSource
from datasetdm_fast.untrusted import documents

FOLDERS = {"train": ("sync",), "test": ("official_splits/test", "official_splits", "")}
SCENE = re.compile(r"(.+_\d+)[a-z]*")


class Nyu(PictureSource):
    """train_list.txt and test_list.txt name images and depths of scenes that nyu_class_list.json names; val is test
    where it has no list of its own.
    """

    max_depth = 10.0
    tasks = ("depth",)
    rule = windows.RULES["nyu"]

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        split = "test" if split == "val" and not (path / "val_list.txt").exists() else split
        self.list = path / f"{split}_list.txt"
        folders = FOLDERS.get(split, (f"official_splits/{split}", split))
        self.folder = reading.first_there(*(path / folder for folder in folders))
        self.rows = [(name.lstrip("/"), depth.lstrip("/")) for name, depth in reading.pairs(self.list)]
        self.images = [self.folder / name for name, _ in self.rows]
        kinds = path / "nyu_class_list.json"
        self.kinds: tuple[str, ...] = ()
        if kinds.exists():
            listed = documents.read_json(kinds)
            if not isinstance(listed, list) or not all(isinstance(kind, str) for kind in listed):
                raise reading.bad(kinds, "no list of scene names")
            self.kinds = tuple(listed)
        super().__init__(size, len(self.rows))

    def sequence(self, record: int) -> str:
        """The numbered scene, which may have parts a, b and so on; images of tests lie by kinds of scenes."""
        scene = SCENE.fullmatch(Path(self.rows[record][0]).parent.name)
        return scene[1] if scene else ""

    def picture(self, record: int) -> Picture:
        name, depth = self.rows[record]
        scene = Path(name).parent.name
        if self.kinds and not any(kind in scene for kind in self.kinds):
            raise reading.bad(self.list, f"{documents.quote(name)} is of no scene that nyu_class_list.json names")
        image = reading.colour_image(reading.inside(self.folder, name, self.list))
        metres = reading.depth_map(reading.inside(self.folder, depth, self.list), image.shape, 1000, self.max_depth)
        place = re.sub(r"_\d+\w*$", "", scene).replace("_", " ").strip()
        return Picture(
            name.removesuffix(Path(name).suffix).replace("/", "_"),
            image,
            f"a photo of a {place or 'room'}",
            depth=metres,
        )
