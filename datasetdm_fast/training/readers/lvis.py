"""lvis:PATH[SPLIT]: LVIS v1 annotations over COCO's images."""

from dataclasses import replace
from pathlib import Path, PurePosixPath

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.readers.coco import SEARCHED, Annotations, Coco


class Lvis(Coco):
    """lvis_v1_SPLIT.json; an image lies where its coco_url ends, below PATH or the folder beside it. It was searched
    for the classes that it shows and those of neg_category_ids alone; one without either is left out.
    """

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.path = path
        annotations = reading.first_there(
            path / f"lvis_v1_{split}.json", path / "annotations" / f"lvis_v1_{split}.json"
        )
        self._open(Annotations(annotations), None, size, False)
        shown = {*self.things.rows["image"].tolist()}
        self.images = [image for image in self.images if image in shown or self._was_searched(image)]
        self.order = range(len(self.images))

    def _was_searched(self, image: int) -> bool:
        """Whether an image without annotations lists classes that it does not show; of others nothing is known."""
        facts = self.things.images[image]
        return (
            image in self.things.bad or SEARCHED[0] not in facts or not {*facts[SEARCHED[0]]}.isdisjoint(self.numbers)
        )

    def picture(self, record: int) -> Picture:
        picture, facts = super().picture(record), self.things.images[self.images[record]]
        absent, more = (tuple(self.numbers[k] for k in facts.get(name, ()) if k in self.numbers) for name in SEARCHED)
        searched = tuple(sorted({*absent, *picture.mask_classes})) if SEARCHED[0] in facts else None
        return replace(picture, searched=searched, not_exhausted=more)

    def image_path(self, image: int) -> Path:
        url = self.things.images[image].get("coco_url")
        parts = PurePosixPath(url).parts[-2:] if isinstance(url, str) else ()
        if len(parts) < 2:
            raise reading.bad(self.things.path, f"image {image} has no coco_url")
        below = reading.inside(self.path, "/".join(parts), self.things.path)
        return below if below.exists() else reading.inside(self.path.parent, "/".join(parts), self.things.path)
