"""deepfashion-mm:PATH: images, segm and captions.json of DeepFashion-MultiModal."""

from pathlib import Path

from datasetdm_fast.engine.labels.class_tables import builtin_table
from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth.picture_source import PictureSource
from datasetdm_fast.untrusted import documents

DEEPFASHION_CLASSES = builtin_table("deepfashion").names


class DeepFashion(PictureSource):
    """Every label map of segm has its image and, where captions.json is there, its caption."""

    classes = DEEPFASHION_CLASSES
    thing_classes = DEEPFASHION_CLASSES[1:]
    tasks = ("semantic", "open-vocabulary")
    rule = "deepfashion"

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        if split != "train":
            raise reading.no_split(path, split)
        self.path, self.maps = path, reading.listing(path / "segm", "_segm.png")
        self.images = [path / "images" / f"{place.name.removesuffix('_segm.png')}.jpg" for place in self.maps]
        captions = path / "captions.json"
        self.captions = documents.read_object(captions, most=reading.LARGEST_LIST) if captions.exists() else None
        self.captions_name_all = self.captions is None
        super().__init__(size, len(self.maps))

    def picture(self, record: int) -> Picture:
        path, stem = self.images[record], self.images[record].stem
        image = reading.colour_image(path)
        labels = reading.label_map(self.maps[record], image.shape, self.classes)
        if self.captions is None:
            return Picture(stem, image, self.things_in(labels), labels)
        caption = self.captions.get(path.name, self.captions.get(stem))
        if not isinstance(caption, str):
            raise reading.bad(self.path / "captions.json", f"no caption for {path.name}")
        return Picture(stem, image, caption, labels)
