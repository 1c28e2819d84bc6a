"""folder:PATH[SPLIT]: images with masks/ID.png, depth/ID.png (16-bit) or both, and classes.txt."""

from pathlib import Path
from types import NoneType

from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.depth import UNITS, unit_of
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.truth.picture_source import PictureSource
from datasetdm_fast.untrusted import documents

CLASSES = "Write one class name per line there, in the order of the numbers in the masks."
PARTS = "images", "masks", "semantic", "depth"


class Folder(PictureSource):
    """images, masks or semantic, depth in PATH or PATH/SPLIT. captions.json may be there, a caption for each file name
    or name without its ending, and there or in PATH max_depth.txt with the farthest depth in metres, which decides the
    unit of depth files as in a run folder.
    """

    rule = "voc"

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        whole, path = path, reading.split_folder(path, split)
        self.path = path
        self.images = reading.listing(path / "images", *reading.PICTURES, *reading.OTHER_PICTURES)
        self.ids = reading.names_of(path / "images", self.images)
        self.maps = path / "semantic" if (path / "semantic").is_dir() else path / "masks"
        self.depths = path / "depth"
        has_maps, has_depth = self.maps.is_dir(), self.depths.is_dir()
        if not has_maps and not has_depth:
            raise reading.bad(path, "neither masks/ nor depth/ beside images/, where folder: reads labels")
        if has_maps:
            files = (folder / "classes.txt" for folder in (path, path.parent))
            self.classes = reading.class_file(reading.first_there(*files, remedy=CLASSES))
            if len(self.classes) > IGNORE:
                raise reading.bad(path / "classes.txt", f"{len(self.classes)} classes, an 8-bit mask can tell {IGNORE}")
            self.thing_classes = reading.without_background(self.classes)
        if has_depth:
            farthest = [folder / "max_depth.txt" for folder in (path, whole)]
            self.max_depth = reading.farthest_depth(next((file for file in farthest if file.exists()), farthest[0]))
            self.depth_steps = UNITS[unit_of(self.max_depth)]
        self.tasks = (*(("semantic", "open-vocabulary") if has_maps else ()), *(("depth",) if has_depth else ()))
        captions = path / "captions.json"
        self.captions = {}
        if captions.exists():
            self.captions = documents.read_object(captions, most=reading.LARGEST_LIST, remedy=reading.CAPTIONS)
        named = sum(self._caption(record) is not None for record in range(len(self.images)))
        if 0 < named < len(self.images):
            self.layout = f"captions.json names {named} of {len(self.images)} images"
        if self.captions and not named:
            raise Refused(
                f"{captions}: names none of the images in {path / 'images'}",
                f"Name them by their paths there, such as {documents.quote(self.ids[0])}.",
            )
        self.captions_name_all = not self.captions
        super().__init__(size, len(self.images))

    def _caption(self, record: int) -> object:
        """The caption of an image in captions.json, by its file name or without the ending."""
        name = self.ids[record]
        return self.captions.get(f"{name}{self.images[record].suffix}", self.captions.get(name))

    def picture(self, record: int) -> Picture:
        path, name = self.images[record], self.ids[record]
        maps, depths = (reading.label_file(folder, name, ".png") for folder in (self.maps, self.depths))
        image = reading.colour_image(path, reading.as_its_labels(maps if self.classes else depths))
        labels = reading.label_map(maps, image.shape, self.classes) if self.classes else None
        depth = reading.depth_map(depths, image.shape, self.depth_steps, self.max_depth) if self.max_depth else None
        caption = self._caption(record)
        if not isinstance(caption, (str, NoneType)):
            raise reading.bad(self.path / "captions.json", f"the caption of {name} is not a text")
        return Picture(name, image, self.things_in(labels) if caption is None else caption, labels, depth=depth)
