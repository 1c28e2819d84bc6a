"""yolo-seg:PATH[SPLIT]: images/SPLIT and labels/SPLIT, a class and a polygon a line, names in data.yaml; or images and
labels, names in classes.txt.
"""

from pathlib import Path

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth.shapes import OutlineSource, Things, polygon
from datasetdm_fast.untrusted import documents


class Yolo(OutlineSource):
    """An image without a label file shows nothing, as YOLO has it."""

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        listed = reading.first_there(*(path / name for name in ("data.yaml", "dataset.yaml", "classes.txt")))
        is_whole = listed.suffix == ".txt" and split == "train"  # as Label Studio exports it
        self.names = reading.class_file(listed) if listed.suffix == ".txt" else _class_names(listed)
        self.set_things(name for name in self.names if not reading.is_background(name))
        names = reading.SPLIT_NAMES.get(split, (split,))
        folder = reading.first_there(
            *(place for name in names for place in (path / "images" / name, path / name / "images")),
            *((path / "images",) if is_whole else ()),
        )
        is_split = folder.parent == path / "images"
        self.labels = path / "labels" / folder.name if is_split else folder.parent / "labels"
        self.images = reading.listing(folder, *reading.PICTURES, *reading.OTHER_PICTURES)
        self.stems = reading.names_of(folder, self.images)
        if not self.labels.is_dir():
            raise reading.bad(self.labels, "no such folder, expected the labels of the images beside it")
        if not any(self._label_file(record).exists() for record in range(len(self.images))):
            raise reading.bad(self.labels, f"no label of any of the {len(self.images)} images of {folder}")
        super().__init__(size, len(self.images))

    def _label_file(self, record: int) -> Path:
        return reading.label_file(self.labels, self.stems[record], ".txt")

    def picture(self, record: int) -> Picture:
        path, labels = self.images[record], self._label_file(record)
        image, things = reading.colour_image(path, reading.as_shown), Things()
        for number, line in reading.numbered_lines(labels, may_be_none=True) if labels.exists() else ():
            try:
                self._add_line(things, line, image.shape)
            except (ValueError, OverflowError) as error:
                raise reading.bad(labels, f"line {number}: {documents.reason_of(error)}") from error
        return Picture(path.stem, image, self.names_of(things), **things.fields)

    def _add_line(self, things: Things, line: str, shape: tuple[int, ...]) -> None:
        try:
            first, *corners = map(float, line.split())
            if (number := int(first)) != first:  # some tools write 0.0
                raise ValueError(first)
        except (ValueError, OverflowError):
            raise ValueError("not a class and the numbers of a polygon") from None
        if not 0 <= number < len(self.names):
            raise ValueError(f"the unknown class {number}, expected 0 to {len(self.names) - 1}")
        if not all(-0.01 <= place <= 1.01 for place in corners):
            raise ValueError("a corner outside the image, expected shares of 0 to 1")
        mask = polygon([place * shape[1 - k % 2] for k, place in enumerate(corners)], shape)
        if (name := self.names[number]) in self.thing_classes:
            things.add(mask, self.thing_classes.index(name))


def _class_names(path: Path) -> tuple[str, ...]:
    document = documents.read_yaml(path)
    names = document.get("names") if isinstance(document, dict) else None
    if isinstance(document, dict) and document.get("kpt_shape"):  # whose boxes and joints would pass for corners
        raise reading.bad(path, "its labels are boxes and joints (kpt_shape), expected outlines of things")
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        by_number = {str(number): name for number, name in names.items()}  # as YOLO has it, numbers may be in quotes
        names = [by_number[str(k)] for k in range(len(by_number))]
    if isinstance(names, list):
        names = [str(name) if type(name) is int else name for name in names]  # a class may be called 7
    is_valid = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not is_valid or len(set(names)) < len(names):
        raise reading.bad(path, "names is no list of different class names")
    return tuple(names)
