"""voc: VOCdevkit/VOC2012 with JPEGImages, label maps of classes and objects, Annotations and ImageSets."""

from collections.abc import Iterable, Iterator, Mapping
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageFilter

from datasetdm_fast import _C
from datasetdm_fast.data import IGNORE
from datasetdm_fast.engine.labels.class_tables import builtin_table, voc_palette
from datasetdm_fast.runs.exporting.classes import Classes, one_line
from datasetdm_fast.runs.exporting.format import AllSamples, Entry, ExportPlan, Files, Format, SampleView, class_map

ROOT = "VOCdevkit/VOC2012"
MOST_OBJECTS = 254  # of a picture, in 8 bits beside nothing and the border
OFFICIAL = {word.name: word.number for word in builtin_table("voc").classes}
PALETTE = bytes(value for colour in voc_palette() for value in colour)


class VocFormat(Format):
    """Class numbers are VOC's if all classes are among its 20, else those of the export; labelmap.txt lists them.

    Where there are objects, the map of classes has theirs, as in VOC.
    """

    needs = (("semantic",), ("instance",))
    forms = ("jpg",)
    has_maps = True

    def convert_sample(self, sample: SampleView, plan: ExportPlan) -> tuple[Files, Entry]:
        _, image = sample.picture(self.forms)
        voc_numbers = numbers(plan.classes)
        translated = np.full(256, IGNORE, np.uint8)
        translated[0] = 0
        for name, number in plan.classes.numbers.items():
            translated[number] = voc_numbers[name]
        classes = translated[class_map(sample, plan)]
        files: Files = {f"{ROOT}/JPEGImages/{sample.name}.jpg": image}
        has_things = "instance" in plan.tasks
        if has_things:
            objects = sample.number_things()
            objects[objects > MOST_OBJECTS] = 0
            if plan.layout.border:
                edge = borders(objects, plan.layout.border)
                objects[edge] = classes[edge] = IGNORE
            objects[sample.ignored] = IGNORE
            files[f"{ROOT}/SegmentationObject/{sample.name}.png"] = _C.png_encode(objects.astype(np.uint8), PALETTE)
        files[f"{ROOT}/SegmentationClass/{sample.name}.png"] = _C.png_encode(classes, PALETTE)
        files[f"{ROOT}/Annotations/{sample.name}.xml"] = "".join(_annotation(sample, has_things)).encode()
        return files, {"name": sample.name}

    def shared_files(self, plan: ExportPlan, samples: AllSamples) -> Mapping[str, Iterable[bytes]]:
        lists = {
            f"{ROOT}/ImageSets/{kind}/{split}.txt": (f"{entry['name']}\n".encode() for entry in samples.entries(split))
            for kind in ("Main", "Segmentation")
            for split in plan.splits
        }
        return {**lists, f"{ROOT}/labelmap.txt": _label_map(plan.classes)}


def numbers(classes: Classes) -> dict[str, int]:
    """The number of each class in the maps."""
    return OFFICIAL if set(classes.names) <= set(OFFICIAL) else classes.numbers


def borders(objects: np.ndarray, width: int) -> np.ndarray:
    """[H, W] bool: the pixels within a border of this width around each object, about half of it inside."""
    edge = np.zeros(objects.shape, bool)
    for number in np.unique(objects[objects > 0]):
        inside = Image.fromarray((objects == number).astype(np.uint8) * 255)
        grown = inside.filter(ImageFilter.MaxFilter(2 * (width - width // 2) + 1))
        shrunk = inside.filter(ImageFilter.MinFilter(2 * (width // 2) + 1))
        edge |= np.asarray(grown) != np.asarray(shrunk)
    return edge


def _label_map(classes: Classes) -> Iterator[bytes]:
    yield b"# label:color_rgb:parts:actions\n"
    table = {"background": 0, **numbers(classes)}
    for name, number in sorted(table.items(), key=lambda item: item[1]):
        red, green, blue = voc_palette()[number]
        yield f"{_clean_name(name)}:{red},{green},{blue}::\n".encode()


def _clean_name(name: str) -> str:
    """A class name as labelmap.txt and annotations have it: a colon would end it, and a # at its begin the line."""
    return one_line(name.replace(":", " ").lstrip("# "))


def _annotation(sample: SampleView, has_things: bool) -> Iterator[str]:
    yield f"<annotation>\n\t<folder>VOC2012</folder>\n\t<filename>{sample.name}.jpg</filename>\n"
    yield "\t<source><database>datasetdm_fast</database></source>\n"
    yield f"\t<size><width>{sample.width}</width><height>{sample.height}</height><depth>3</depth></size>\n"
    yield "\t<segmented>1</segmented>\n"
    for thing in sample.things if has_things else ():
        x, y, width, height = thing.box  # places are counted from 1, and the last pixel is inside
        box = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
        sides = "".join(f"<{side}>{value:.0f}</{side}>" for side, value in box.items())
        is_cut = x == 0 or y == 0 or x + width == sample.width or y + height == sample.height
        yield f"\t<object>\n\t\t<name>{escape(_clean_name(thing.name))}</name>\n\t\t<pose>Unspecified</pose>\n"
        yield f"\t\t<truncated>{is_cut:d}</truncated>\n\t\t<difficult>0</difficult>\n"
        yield f"\t\t<bndbox>{sides}</bndbox>\n\t</object>\n"
    yield "</annotation>\n"
