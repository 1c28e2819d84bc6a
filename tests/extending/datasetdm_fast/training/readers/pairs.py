"""pairs:PATH[SPLIT]: classes.txt, and in PATH/SPLIT each picture NAME.png beside its map NAME.classes.png."""

from __future__ import annotations

from pathlib import Path

from datasetdm_fast.engine.pictures import reading
from datasetdm_fast.engine.pictures.labelled import Picture
from datasetdm_fast.training.truth.picture_source import PictureSource


class Pairs(PictureSource):
    tasks = ("semantic",)
    rule = "voc"

    def __init__(self, path: Path, split: str, size: int, tasks: tuple[str, ...]):
        self.classes = reading.class_file(path / "classes.txt")
        self.maps = sorted((path / split).glob("*.classes.png"))
        super().__init__(size, len(self.maps))

    def name(self, record: int) -> str:
        return str(self.maps[record])

    def picture(self, record: int) -> Picture:
        labels = self.maps[record]
        name = labels.name.removesuffix(".classes.png")
        image = reading.colour_image(labels.with_name(f"{name}.png"))
        return Picture(name, image, "a photo", reading.label_map(labels, image.shape, self.classes))
