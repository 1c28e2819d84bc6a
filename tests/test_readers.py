"""Readers: three images in each data set's own layout, what they become at the model's size, selections, and every kind
of bad data by name.
"""

import base64
import io
import itertools
import json
import math
import os
import re
import shutil
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from layouts import COUNT, LAYOUTS, SIDE, TAUGHT, save, text, things_of, views
from PIL import Image
from pyarrow import parquet
from rendered import document
from skips import IS_LONG

from bench.proof.students.examples import whole_item
from datasetdm_fast import convert, filter
from datasetdm_fast import split as splitting
from datasetdm_fast.data import IGNORE, Instances, Trust
from datasetdm_fast.engine.labels.label_files import with_text
from datasetdm_fast.engine.pictures import framing, reading
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS, Labelled, LabelledSource, Picture, largest_first
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.exporting.cityscapes import LABEL_IDS
from datasetdm_fast.runs.run_folder.folder import RunFolder, replace_file
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_folder.selections import SPLIT, Split
from datasetdm_fast.training import data_record, readers, session, splits
from datasetdm_fast.training.captures.targets import check_truth
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.readers import (
    PRESETS,
    DataSettings,
    Selection,
    celebamask,
    cityscapes,
    coco,
    coco_layout,
    cvat,
    hf,
    is_read,
    label_studio,
    open_data,
    voc,
    yolo,
)
from datasetdm_fast.training.readers import run as run_reader
from datasetdm_fast.training.readers.folder import Folder
from datasetdm_fast.training.settings import Inversion, ModelChoice, TrainingData
from datasetdm_fast.training.truth import selection as selection_of_images
from datasetdm_fast.training.truth import shapes, tables, windows
from datasetdm_fast.training.truth.augment import Augmentation, augment
from datasetdm_fast.training.truth.picture_source import PictureSource
from datasetdm_fast.training.truth.selection import least_mask
from datasetdm_fast.untrusted import images
from datasetdm_fast.untrusted.json_stream import JsonStream

SIZE = 64


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder of each layout, written once."""
    roots: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp(name) / "data"
            LAYOUTS[name][1](roots[name])
        return roots[name]

    return make


@pytest.fixture
def copied(made, tmp_path):
    """A layout that a test may damage, and its address."""

    def copy(name: str) -> tuple[Path, str]:
        root = tmp_path / name
        shutil.copytree(made(name), root)
        return root, f"{LAYOUTS[name][0]}:{root}"

    return copy


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_at_the_models_size(made, name):
    kind, _, tasks = LAYOUTS[name]
    source = open_data(f"{kind}:{made(name)}", SIZE)
    assert source.tasks == tasks and len(source) == COUNT
    items = list(source)
    assert [item.id for item in items] == [source[k].id for k in range(COUNT)] and len(
        {item.id for item in items}
    ) == COUNT
    for item in items:
        assert (
            item.image.shape == (SIZE, SIZE, 3)
            and item.image.dtype == np.uint8
            and item.image.std() > 5
            and item.caption
        )
        if "semantic" in tasks:
            assert item.semantic.shape == (SIZE, SIZE) and item.semantic.dtype == np.uint8
            assert (
                set(np.unique(item.semantic)) <= {*range(len(source.classes)), 255}
                and len(np.unique(item.semantic)) > 1
            )
        if "open-vocabulary" in tasks:
            assert (
                item.masks.shape == (len(item.mask_classes), SIZE, SIZE)
                and item.masks.any((1, 2)).all()
                and len(item.masks)
            )
            assert (item.mask_classes < len(source.thing_classes)).all()
        if "depth" in tasks:
            assert (
                item.depth.dtype == np.float32
                and 0 < item.depth[item.depth > 0].min()
                and item.depth.max() <= source.max_depth
            )
        if "pose" in tasks:
            assert item.keypoints.shape[1:] == (len(source.joints), 3)
            assert len(item.keypoints) == len(item.keypoint_boxes) == len(item.keypoint_areas)


def parts_of(kind, tasks):
    """The tasks that a training takes together: pose of coco: by itself, as it is read from one person at a time."""
    others = [task for task in tasks if (kind, task) != ("coco", "pose")]
    return [part for part in (others, [task for task in tasks if task not in others]) if part]


@pytest.mark.usefixtures("tiny_has_one_layer")
@pytest.mark.parametrize("name", LAYOUTS if IS_LONG else TAUGHT)
def test_a_decoder_is_taught_and_judged_by_every_layout(made, tmp_path, monkeypatch, capsys, name):
    from datasetdm_fast import evaluate, train

    monkeypatch.setenv("DATASETDM_CACHE", str(tmp_path / "cache"))
    kind, _, tasks = LAYOUTS[name]
    data = ["--model", "tiny", "--data", f"{kind}:{made(name)}", "--threads", "1", "--quiet", "--json"]
    for part in parts_of(kind, tasks) if IS_LONG else [tasks[-1:]]:
        shared = [*data, "--task", ",".join(part)]
        flags = ["--out", str(tmp_path / "decoder"), "--steps", "2", "--draws", "2", "--batch-size", "2"]
        assert train.main([*shared, *flags]) == 0
        capsys.readouterr()
        assert evaluate.main([*shared, "--decoder", str(tmp_path / "decoder"), "--bootstrap", "5"]) == 0
        assert list(json.loads(capsys.readouterr().out)) == list(part)


def test_labels_stay_where_the_image_is(made):
    """The scenes' own masks, cut and resized by the same window, are what the readers say."""
    for name, rows, columns in (
        ("folder", slice(0, 80), slice(0, SIDE)),
        ("cityscapes", slice(24, 72), slice(0, SIDE)),
    ):
        source = open_data(f"{LAYOUTS[name][0]}:{made(name)}", SIZE)
        for item, view in zip(source, views()):
            image, truth = view.image[rows, columns], view.semantic[rows, columns]
            height, width = truth.shape
            left, top = (width - min(height, width)) // 2, (height - min(height, width)) // 2
            square = Image.fromarray(image[top : top + min(height, width), left : left + min(height, width)])
            wanted = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).astype(int)
            assert np.abs(wanted - item.image).mean() < 1
            square = Image.fromarray(truth[top : top + min(height, width), left : left + min(height, width)])
            shown = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.NEAREST))
            known = item.semantic != 255
            agree = (
                (item.semantic == np.where(shown < 2, shown, shown + 9))
                if name == "cityscapes"
                else item.semantic == shown
            )
            assert agree[known].mean() > 0.98


def test_a_plain_folder_has_the_unit_of_a_run_folder_where_depths_are_far(tmp_path):
    for name, pixels in (("images", np.zeros((64, 64, 3), np.uint8)), ("depth", np.full((64, 64), 20479, np.uint16))):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    (tmp_path / "max_depth.txt").write_text("80\n")
    assert open_data(f"folder:{tmp_path}", SIZE)[0].depth.max() == np.float32(20479 / 256)
    for name in ("images", "depth"):
        shutil.move(tmp_path / name, tmp_path / "val" / name)
    assert open_data(f"folder:{tmp_path}[val]", SIZE)[0].depth.max() == np.float32(20479 / 256)


def test_a_run_teaches_what_a_filter_keeps_and_nothing_calls_doubtful(copied):
    root, address = copied("run")
    before = [item.id for item in open_data(address, SIZE)]
    with RunFolder(root, document(COUNT, SIDE)) as folder:
        folder.ledger.commit(
            replace(row, trust=Trust(reasons=("it is",)) if row.request.index == 1 else Trust(), recipe={"group": "g"})
            for row in list(folder.ledger.rows())
        )
    assert [item.id for item in open_data(address, SIZE)] == [before[0], before[2]]
    assert filter.main([str(root), "--where", "trust == 0", "--quiet"]) == 0
    with pytest.raises(Refused, match="the one sample that it keeps is doubtful"):
        open_data(address, SIZE)
    whole = open_data(f"{address}[all]", SIZE)
    assert [item.id for item in whole] == before and [whole.origins(k) for k in range(COUNT)] == [("g",)] * COUNT
    with open_run(root) as run, pytest.raises(Refused, match="no split 'val'"):
        sample, item = run[0], open_data(f"{address}[all]", SIDE)[0]
        assert (sample.image == item.image).all() and (sample.semantic.labels == item.semantic).all()
        assert (sample.instances.masks == item.masks).all() and (sample.depth.metres == item.depth).all()
        assert item.keypoints[..., :2] == pytest.approx(sample.keypoints.points[..., :2], abs=1e-4)
        assert (item.keypoints[..., 2] == sample.keypoints.visibility).all()
        people = sample.row.labels["pose"]
        assert item.keypoint_boxes == pytest.approx(np.array([each["bbox"] for each in people]), abs=1e-3)
        assert item.keypoint_areas == pytest.approx([each["area"] for each in people], rel=1e-5)
        metres = open_data(f"{address}[all]", SIDE, tasks=("depth",))[0]
        assert metres.semantic is metres.masks is metres.keypoints is None and metres.depth is not None
        open_data(f"{address}[val]", SIZE)


def test_things_named_by_words_of_the_class_table_of_a_run_are_not_ignored(copied):
    root, address = copied("run")
    table = [{"name": name, "say": "", "words": [name[::-1]]} for name in world.THINGS]
    with RunFolder(root, document(COUNT, SIDE)) as folder:
        rows = list(folder.ledger.rows())
        folder.ledger.commit(
            replace(row, request=replace(row.request, classes=first, prompt=f"{first} {others}"), trust=None)
            for row in rows
            for first, others in [(row.request.classes[:1], " ".join(name[::-1] for name in row.request.classes[1:]))]
        )
    assert len(open_data(address, SIZE)) < COUNT
    (root / "run.json").write_text(json.dumps(document(COUNT, SIDE) | {"class_table": table}))
    assert len(open_data(address, SIZE)) == COUNT
    whole = open_data(f"{address}[all]", SIZE)
    assert all((item.semantic == truth.semantic).all() for item, truth in zip(open_data(address, SIZE), whole))


def test_instances_of_a_run_are_things_from_the_score_on_at_which_they_are_shown():
    label = Instances(np.zeros((2, 4, 4), bool), np.array([0, 1]), np.float32([0.4, 0.39]), ("ball", "cube"))
    for is_corrected, things, crowds in ((False, [0], [1]), (True, [0, 1], [])):
        place = SimpleNamespace(thing_classes=label.classes, is_corrected=is_corrected, _check_sides=lambda *_: None)
        fields = run_reader.RunSamples._class_fields(place, label, 0, (4, 4))
        assert (fields["mask_classes"], fields["crowd_classes"]) == (things, crowds)
        assert (len(fields["masks"]), len(fields["crowds"])) == (len(things), len(crowds))


def test_brackets_of_a_run_name_its_part_and_its_map():
    texts = ("val", "semantic", "val,semantic.fine", "semantic,val", "a,b,semantic")
    parts = [("val", ""), ("train", "semantic"), ("val", "semantic:fine"), ("val", "semantic"), ("a,b,semantic", "")]
    assert [run_reader._split_and_label(text) for text in texts] == parts


def test_a_part_of_a_run_whose_samples_are_all_doubtful_says_so(copied):
    root, address = copied("run")
    with RunFolder(root, document(COUNT, SIDE)) as folder:
        folder.ledger.commit(
            replace(row, trust=Trust(reasons=("it is",) if row.request.index else ()))
            for row in list(folder.ledger.rows())
        )
    replace_file(root, document(COUNT, SIDE), SPLIT, Split(0, False, {"train": (0,), "test": (1, 2)}).content)
    assert len(open_data(address, SIZE)) == 1
    with pytest.raises(Refused, match=r"run\[test\]: all 2 samples that it keeps are doubtful"):
        open_data(f"{address}[test]", SIZE)


def test_a_run_of_which_filter_or_split_keep_nothing_says_so(copied):
    root, address = copied("run")
    replace_file(root, document(COUNT, SIDE), SPLIT, Split(0, False, {"train": (), "val": tuple(range(COUNT))}).content)
    with pytest.raises(Refused, match=r"run\[train\]: no sample is left"):
        open_data(address, SIZE)
    assert len(open_data(f"{address}[val]", SIZE)) == COUNT
    replace_file(root, document(COUNT, SIDE), SPLIT, None)
    assert filter.main([str(root), "--where", "trust > 1", "--quiet"]) == 0
    with pytest.raises(Refused, match="run: no sample is left"):
        open_data(address, SIZE)
    assert len(open_data(f"{address}[all]", SIZE)) == COUNT


def test_a_part_of_a_run_that_has_grown_since_it_was_split_says_so(copied):
    root, address = copied("run")
    split = Split(0, False, {"train": (0,), "test": tuple(range(1, COUNT - 1))})
    replace_file(root, document(COUNT, SIDE), SPLIT, split.content)
    with pytest.raises(Refused, match=f"sample {COUNT - 1:08d} is in no part of its split"):
        open_data(f"{address}[train]", SIZE)
    assert len(open_data(f"{address}[all]", SIZE)) == COUNT


def test_binary_masks_are_read_whatever_their_file_holds(copied):
    root, address = copied("mask")
    before = [item.semantic for item in open_data(address, SIZE)]
    assert all(set(np.unique(labels)) == {0, 1} for labels in before)
    for k, write in enumerate(
        (lambda mask: mask > 127, lambda mask: mask // 255, lambda mask: mask[..., None].repeat(4, 2))
    ):
        path = next((root / "DIS-TR" / "gt").glob(f"{k}#*"))
        save(path, write(np.asarray(Image.open(path))))
    after = open_data(address, SIZE)
    assert all((item.semantic == labels).all() for item, labels in zip(after, before)) and after[0].caption.endswith(
        "a ball"
    )
    (root / "classes.txt").write_text("background\nsalient thing\n")
    assert open_data(f"{address}[DIS-TR]", SIZE).thing_classes == ("salient thing",)
    with pytest.raises(Refused, match="no split 'val'"):
        open_data(f"{address}[val]", SIZE)
    path = next((root / "DIS-TR" / "gt").glob("0#*"))
    save(path, np.random.default_rng(0).integers(0, 255, (80, SIDE, 3), np.uint8))
    with pytest.raises(Refused, match="its pixels have colours"):
        open_data(address, SIZE)[0]


@pytest.mark.parametrize(
    ("numbers", "colours"),
    [
        ((1, 0), (255, 255, 255, 0, 0, 0)),  # as programs write that make files small: white may come first
        ((0, 1), (0, 0, 0, 255, 255, 255)),
        ((0, 1), ()),  # it tells no colours
        ((0, 1), (0, 0, 0, 64, 0, 0)),  # a colour of VOC's
    ],
)
def test_a_binary_mask_with_a_palette_is_what_it_shows(tmp_path, numbers, colours):
    mask = np.zeros((32, 32), bool)
    mask[:20] = True
    for there in (mask, np.zeros_like(mask)):
        image = Image.fromarray(np.where(there, numbers[1], numbers[0]).astype(np.uint8), "P")
        image.putpalette(colours) if colours else None
        image.save(tmp_path / "mask.png")
        assert (reading.binary_mask(tmp_path / "mask.png", mask.shape) == there).all()


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [("coco", "annotations/instances_train2017.json", "cone"), ("yolo-seg", "data.yaml", "cone")],
)
def test_a_category_called_background_is_no_thing(copied, kind, file, name):
    root, address = copied(kind)
    before = list(open_data(address, SIZE, tasks=("semantic", "instance")))
    (root / file).write_text((root / file).read_text().replace(name, "Background"))
    source = open_data(address, SIZE, tasks=("semantic", "instance"))
    assert source.classes == ("background", *source.thing_classes)
    assert not {name, "Background"} & set(source.thing_classes)
    meter = METRICS["semantic"](source)
    for item, was in zip(source, before, strict=True):
        kept = was.mask_classes != world.THINGS.index(name)
        assert (item.masks == was.masks[kept]).all()
        assert [source.thing_classes[k] for k in item.mask_classes] == [world.THINGS[k] for k in was.mask_classes[kept]]
        assert "background" not in item.caption.lower()
        meter.add(item, TASKS["semantic"].truth(source, item))
    assert meter.result()["miou"] == 1
    assert set(source.areas(0)) <= set(source.thing_classes)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("shade", [0, 255, None])
def test_a_binary_mask_may_be_what_is_opaque(tmp_path, mode, shade):
    mask = np.zeros((32, 32), bool)
    mask[:20] = True
    drawn = np.where(mask, 255, 0).astype(np.uint8)
    grey = drawn if shade is None else np.full_like(drawn, shade)
    half = np.where(mask, 255, 127).astype(np.uint8)  # not more than half of the most is not opaque
    for alpha in (drawn, half, *([np.full_like(drawn, 255), np.zeros_like(drawn)] if shade is None else [])):
        planes = [grey] * (len(mode) - 1) + [alpha]
        Image.merge(mode, [Image.fromarray(plane) for plane in planes]).save(tmp_path / "mask.png")
        assert (reading.binary_mask(tmp_path / "mask.png", mask.shape) == mask).all()


@pytest.mark.parametrize("name", ["labelme", "cvat"])
def test_outlines_of_programs_become_masks(copied, name):
    root, address = copied(name)
    source = open_data(address, SIDE)
    for item, view in zip(source, views()):
        wide = Image.fromarray(view.image[:80]).crop((8, 0, 88, 80)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(wide).astype(int) - item.image).mean() < 4
        shown = [world.THINGS[kind] for _, kind, mask in things_of(view) if mask[:80, 8:88].any()]
        assert sorted(source.thing_classes[k] for k in item.mask_classes) == sorted(shown)
    if name == "labelme":
        path = root / "scene 0.json"
        photo = (root / "scene 0.jpg").read_bytes()
        (root / "scene 0.jpg").unlink()
        circle = {"label": "ball", "points": [[40, 40], [40, 50]], "shape_type": "circle", "group_id": 7}
        parts = [circle, circle | {"points": [[70, 40], [70, 50]]}, circle | {"label": "__ignore__"}]
        inner = {"imagePath": "..\\photos\\scene 0.jpg", "imageData": base64.b64encode(photo).decode()}
        rewrite(path, lambda found: found.update(shapes=parts, **inner))
    else:
        parts = (
            '<ellipse label="ball" cx="40" cy="40" rx="10" ry="10" group_id="7"/><polygon group_id="7" label="ball" '
            'points="60,40;70,30;80,40;70,50"/><box label="ignore" xtl="30" ytl="35" xbr="50" ybr="45" rotation="90"/>'
        )
        path = root / "annotations.xml"
        path.write_text(
            re.sub(r'(day/0.png"[^>]*>).*?</image>', lambda found: f"{found[1]}{parts}</image>", path.read_text())
        )
    item = open_data(address, 80)[0]
    areas = {"labelme": (2 * np.pi * 100, np.pi * 100), "cvat": (np.pi * 100 + 200, 200)}[name]
    assert item.masks.sum() == pytest.approx(areas[0], rel=0.05) and len(item.masks) == 1
    assert item.crowd_classes.tolist() == [EVERY_CLASS]
    assert item.crowds.sum() == pytest.approx(areas[1], rel=0.08) and (item.semantic[item.crowds[0]] == 1).any()


@pytest.mark.parametrize("path", ["..\\photos\\", "../photos/", "C:\\me\\", "/home/me/"])
def test_a_picture_of_labelme_lies_beside_its_file_whatever_its_path_was(copied, path):
    root, address = copied("labelme")
    before = open_data(address, SIZE)[0].image
    rewrite(root / "scene 0.json", lambda found: found.update(imagePath=f"{path}scene 0.jpg", imageData=None))
    assert (open_data(address, SIZE)[0].image == before).all()
    rewrite(root / "scene 0.json", lambda found: found.update(imagePath=f"{path}.."))
    with pytest.raises(Refused, match="leads out of its folder"):
        open_data(address, SIZE)[0]


def test_a_picture_of_labelme_without_a_path_is_in_its_file(copied):
    root, address = copied("labelme")
    before = open_data(address, SIZE)[0].image
    (root / "labels").mkdir()
    data = base64.b64encode((root / "scene 0.jpg").read_bytes()).decode()
    (path := root / "scene 0.json").rename(moved := root / "labels" / path.name)
    rewrite(moved, lambda found: found.update(imagePath="", imageData=data))
    assert any((item.image == before).all() for item in open_data(address, SIZE))


@pytest.mark.parametrize("path", ["../images/", "..\\images\\"])
def test_files_of_labelme_may_have_a_folder_beside_that_of_the_pictures(copied, path):
    root, address = copied("labelme")
    before = [item.image for item in open_data(address, SIZE)]
    for folder, ending in ((root / "images", "jpg"), (root / "labels", "json")):
        folder.mkdir()
        for file in root.glob(f"*.{ending}"):
            file.rename(folder / file.name)
    for file in (root / "labels").iterdir():
        rewrite(file, lambda found: found.update(imagePath=f"{path}{found['imagePath']}", imageData=None))
    assert all((item.image == image).all() for item, image in zip(open_data(address, SIZE), before, strict=True))


def test_masks_of_cvat_may_lie_at_the_edges_and_no_further():
    def mask(left, top, width, height, runs):
        names = {"left": left, "top": top, "width": width, "height": height, "rle": runs}
        return cvat._runs({name: str(value) for name, value in names.items()}, (4, 5))

    assert mask(0, 0, 5, 4, "0,20")().all() and mask(0, 0, 5, 4, "20")().sum() == 0
    assert np.argwhere(mask(4, 3, 1, 1, "0, 1")()).tolist() == [[3, 4]]
    assert np.argwhere(mask(1, 2, 3, 2, "2,2,2")()).tolist() == [[2, 3], [3, 1]]
    for box in ((-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 0, 2), (0, 0, 2, 0), (4, 0, 2, 2), (0, 3, 2, 2)):
        with pytest.raises(ValueError, match="outside of its picture"):
            mask(*box, "4")
    overflowing = f"{2**63 - 1},{2**63 - 1},6"  # whose sum is 4 in 64 bits
    for runs in ("3", "5", "-1,5", "0,1,1,1,1,0", overflowing):
        with pytest.raises(ValueError, match="runs that do not add up to the 2 x 2 pixels"):
            mask(0, 0, 2, 2, runs)


def test_an_ellipse_of_cvat_is_as_wide_and_as_high_as_its_radii_say():
    shape = ElementTree.fromstring('<ellipse cx="10" cy="8" rx="6" ry="2"/>')
    mask = cvat._mask(shape, (16, 20))()
    assert [mask.any(axis).nonzero()[0][[0, -1]].tolist() for axis in (0, 1)] == [[4, 15], [6, 9]]


def test_shapes_of_cvat_in_the_group_zero_are_things_of_their_own(copied):
    """Zero is what CVAT calls no group."""
    root, address = copied("cvat")
    box = '<box label="ball" xtl="{0}" ytl="10" xbr="{1}" ybr="20" group_id="{2}"/>'
    for group, count in ((0, 2), (10, 1)):
        boxes = "".join(box.format(left, left + 10, group) for left in (10, 40))
        path = root / "annotations.xml"
        path.write_text(re.sub(r'(day/0.png"[^>]*>).*?</image>', rf"\g<1>{boxes}</image>", path.read_text()))
        assert len(open_data(address, SIDE)[0].masks) == count


def test_a_picture_of_cvat_lies_in_the_folder_of_its_subset_before_that_of_all(copied):
    root, address = copied("cvat")
    path = root / "annotations.xml"
    path.write_text(path.read_text().replace("<image ", '<image subset="more" ', 1))
    before = open_data(address, SIZE)[0].image
    picture = Path(open_data(address, SIZE).name(0))
    save(root / "images" / "more" / picture.relative_to(root / "images"), 255 - np.asarray(Image.open(picture)))
    assert (open_data(address, SIZE)[0].image != before).any()


def test_datumaro_calls_a_file_of_cvat_as_its_split(copied):
    """All splits have one folder of images there, and a mask covers the whole picture."""
    root, address = copied("cvat")
    whole = open_data(address, SIDE)
    (root / "annotations.xml").rename(root / "val.xml")
    runs = '<mask label="ball" rle="3880, 40, 3760" left="0" top="0" width="96" height="80"/>'
    images = re.compile("(<image .*?>).*</image>", re.DOTALL)
    text(root / "train.xml", images.sub(rf"\1{runs}</image>", (root / "val.xml").read_text()))
    (item,), valued = open_data(address, SIDE), open_data(f"{address}[val]", SIDE)
    assert len(item.masks) == 1 and len(valued) == len(whole)
    assert all((one.masks == other.masks).all() for one, other in zip(valued, whole, strict=True))
    with pytest.raises(Refused, match=r"test"):
        open_data(f"{address}[test]", SIDE)


@pytest.mark.parametrize(
    "outline",
    ['polygon points="40,30;60,30;60,50"', 'mask rle="3880, 20, 3780" left="0" top="0" width="96" height="80"'],
)
def test_a_box_that_datumaro_writes_beside_an_outline_of_its_group_is_ignored(copied, outline):
    """One that its outline leaves is a part of the thing."""
    root, address = copied("cvat")
    path, masks = root / "annotations.xml", []
    for box in ("", '<box xtl="40" ytl="30" xbr="60" ybr="50" {0}/>', '<box xtl="40" ytl="30" xbr="50" ybr="50" {0}/>'):
        held = f"<{outline} {{0}}/>{box}".format('label="ball" group_id="3"')
        path.write_text(re.sub(r'(day/0.png"[^>]*>).*?</image>', rf"\g<1>{held}</image>", path.read_text()))
        masks += list(open_data(address, SIDE)[0].masks)
    alone, boxed, of_parts = masks
    assert (boxed == alone).all() and of_parts.sum() > alone.sum() + 50


@pytest.mark.parametrize("change", [lambda text: re.sub("<image .*</image>", "", text, flags=re.DOTALL), None])
def test_what_is_no_task_of_cvat_is_refused(copied, change):
    root, address = copied("cvat")
    path = root / "annotations.xml"
    change = change or (lambda text: text.replace("<annotations>", "<tasks>").replace("</annotations>", "</tasks>"))
    path.write_text(change(path.read_text()))
    with pytest.raises(Refused, match="no image in it, expected what CVAT calls"):
        open_data(address, SIZE)


def test_a_shape_of_a_label_that_its_task_of_cvat_lacks_is_refused(copied):
    root, address = copied("cvat")
    path = root / "annotations.xml"
    path.write_text(path.read_text().replace("<box ", '<box label="mug" xtl="1" ytl="1" xbr="9" ybr="9"/><box ', 1))
    with pytest.raises(Refused, match="the unknown class 'mug'"):
        list(open_data(address, SIZE))


def test_a_packed_mask_may_be_large():
    numbers = np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)
    content = io.BytesIO()
    Image.fromarray(numbers).save(content, "PNG")
    packed = base64.b64encode(zlib.compress(content.getvalue())).decode()
    assert (np.asarray(shapes.decode_image(packed, "a", is_packed=True)) == numbers).all()


def test_labels_of_cvat_that_bound_no_area_are_no_classes(copied):
    root, address = copied("cvat")
    classes, path = open_data(address, SIZE).thing_classes, root / "annotations.xml"
    more = "<label><name>joints</name><type>skeleton</type></label><label><name>1</name><type>points</type></label>"
    path.write_text(path.read_text().replace("<labels>", f"<labels>{more}"))
    assert open_data(address, SIZE).thing_classes == classes
    whole = open_data(address, SIZE)[0].image
    path.write_text(path.read_text().replace("<image ", '<image subset="train" '))  # and all pictures in one folder
    assert (open_data(address, SIZE)[0].image == whole).all()
    bare = re.sub("<labels>.*</labels>", "", path.read_text())
    path.write_text(bare.replace('tag label="ball"', 'tag label="sunny"'))
    shown = open_data(address, SIZE)  # without a list of the task the classes are those of the shapes
    assert set(shown.thing_classes) <= set(classes) and len(shown[0].masks)


def test_faces_are_drawn_part_by_part_and_split_as_celeba_is(copied):
    root, address = copied("celebamask-hq")
    item = open_data(address, 2 * SIDE)[0]
    view = views()[0]
    wanted = np.where(view.semantic > 0, 1, 0)
    wanted[view.instance > 0] = 4
    wanted[view.semantic == 1] = 13
    assert (item.semantic == wanted.repeat(2, 0).repeat(2, 1)).all()
    assert open_data(address, SIZE).classes[4] == "left eye"
    mapping = root / "CelebA-HQ-to-CelebA-mapping.txt"
    mapping.write_text("idx orig_idx orig_file\n0 162770 162771.jpg\n1000 182637 182638.jpg\n2000 5 6.jpg\n")
    found = {split: [item.id for item in open_data(f"{address}[{split}]", 32)] for split in ("train", "val", "test")}
    assert found == {"train": ["02000"], "val": ["00000"], "test": ["01000"]}
    mapping.unlink()
    assert len(open_data(address, SIZE)) == COUNT
    with pytest.raises(Refused, match="no split 'val'"):
        open_data(f"{address}[val]", SIZE)


def test_parts_of_faces_have_the_names_of_their_files_and_the_numbers_of_celeba():
    sides = {"eye": "eye", "brow": "eyebrow", "ear": "ear"}
    words = {f"{side[0]}_{part}": f"{side} {word}" for side in ("left", "right") for part, word in sides.items()}
    words |= {"u_lip": "upper lip", "l_lip": "lower lip", "eye_g": "glasses", "ear_r": "earring", "neck_l": "necklace"}
    words |= {"cloth": "clothes", **{part: part for part in ("skin", "nose", "mouth", "hair", "hat", "neck")}}
    assert dict(zip(celebamask.PARTS, celebamask.NAMES, strict=True)) == words
    assert celebamask.PARTS[0] == "skin" and celebamask.PARTS[-6:] == "hair hat ear_r neck_l neck cloth".split()
    assert celebamask.SPLITS == {"train": (0, 162_770), "val": (162_770, 182_637), "test": (182_637, 202_599)}


def test_depths_are_metres_in_every_unit(made):
    for name, rows in (
        ("nyu", slice(0, 72)),
        ("kitti", slice(48, 80)),
        ("vkitti2", slice(0, 64)),
        ("folder", slice(0, 80)),
    ):
        source = open_data(f"{LAYOUTS[name][0]}:{made(name)}", SIZE)
        for item, view in zip(source, views()):
            found, truth = item.depth[item.depth > 0], view.depth[rows]
            assert truth.min() - 0.01 <= found.min() and found.max() <= truth.max() + 0.01
    assert (open_data(f"kitti:{made('kitti')}", SIZE)[0].depth == 0).mean() == pytest.approx(
        0.5, abs=0.05
    )  # rows the laser missed stay unknown
    assert (open_data(f"vkitti2:{made('vkitti2')}", SIZE)[0].depth[0] == 0).all()  # the sky is beyond 80 m


@pytest.mark.parametrize(
    ("name", "files", "farthest"),
    [
        ("kitti", "gt_depth/**/*.png", 20480),
        ("nyu", "sync/**/*depth*.png", 10000),
        ("vkitti2", "Depth/**/*.png", 8000),
    ],
)
def test_depths_of_benchmarks_by_hand(copied, name, files, farthest):
    root, address = copied(name)
    most = {"kitti": 80, "nyu": 10, "vkitti2": 80}[name]
    for number, metres in ((1280, 1280 * most / farthest), (farthest, most), (farthest + 1, 0)):
        for path in root.glob(files):
            save(path, np.full(np.asarray(Image.open(path)).shape, number, np.uint16))
        assert open_data(address, SIZE)[0].depth.max() == np.float32(metres)


def test_a_caption_of_a_folder_goes_by_the_name_of_its_file_before_the_stem():
    held = SimpleNamespace(ids=["more/a", "b"], images=[Path("more/a.png"), Path("b.jpg")])
    held.captions = {"more/a": "one", "more/a.png": "two", "b": "three"}
    assert [Folder._caption(held, record) for record in (0, 1)] == ["two", "three"]


def test_an_object_of_voc_has_the_class_of_most_of_its_pixels_but_the_border(tmp_path):
    save(tmp_path / "0.png", np.uint8([[1, 1, 1, 1, 1, 0]]))
    place = SimpleNamespace(objects=tmp_path, maps=tmp_path)
    masks, classes = voc.Voc._objects(place, "0", np.uint8([[255, 255, 255, 3, 0, 0]]))
    assert classes == [2] and [mask().tolist() for mask in masks] == [[[True] * 5 + [False]]]


@pytest.mark.parametrize(
    ("annotation", "count"),
    [
        ({"keypoints": [5, 5, 1, 6, 6, 2, 0, 0, 0]}, 2),
        ({"keypoints": [0, 0, 2, 6, 6, 0, 7, 7, 0]}, 1),
        ({"keypoints": [5, 5, 2], "num_keypoints": 0}, 0),
        ({}, 0),
    ],
)
def test_joints_that_coco_does_not_count_are_counted_hidden_ones_too(annotation, count):
    assert coco._count_joints(annotation) == count


def test_coco_masks_crowds_and_label_map_agree(made):
    source = open_data(f"coco:{made('coco')}", SIZE, tasks=["instance", "semantic"])
    item = source[0]
    assert len(item.crowds) == 1 and item.crowds[0][:, -1].all() and item.keypoints is None
    assert len(item.masks) == len([1 for *_, mask in things_of(views()[0]) if mask[8:88, :80].any()])
    covered = item.masks.any(0)
    assert (item.semantic[covered] > 0).all() and (item.semantic[item.crowds[0] & ~covered] == 255).all()
    assert source.classes[0] == "background" and source.classes[1:] == source.thing_classes


def test_lvis_tells_which_classes_an_image_was_searched_for(copied):
    root, address = copied("lvis")
    path = root / "lvis_v1_train.json"
    assert open_data(address, SIZE)[0].searched is None
    categories = [row["id"] for row in json.loads(path.read_text())["categories"]]
    told = {"neg_category_ids": categories[:1], "not_exhaustive_category_ids": categories[-1:]}
    rewrite(path, lambda d: d["images"][0].update(told))
    source = open_data(address, SIZE)
    item = source[0]
    assert item.searched == tuple(sorted({0, *item.mask_classes.tolist()})) and source[1].searched is None
    assert item.not_exhausted == (len(categories) - 1,)


@pytest.mark.parametrize("url", ["000000000000.jpg", "", 7, None])
def test_an_lvis_image_without_the_folder_of_its_picture_is_told(copied, url):
    root, address = copied("lvis")
    rewrite(root / "lvis_v1_train.json", lambda d: d["images"][0].update(coco_url=url))
    with pytest.raises(Refused, match="has no coco_url"):
        list(open_data(address, SIZE))


def test_an_lvis_image_that_was_searched_for_nothing_is_left_out(copied):
    root, address = copied("lvis")
    path = root / "lvis_v1_train.json"
    first, *others = [item.id for item in open_data(address, SIZE)]

    def searched_for(classes: list[int]) -> None:
        def without_things(document: dict) -> None:
            image = document["images"][0]
            image["neg_category_ids"] = classes
            document["annotations"] = [row for row in document["annotations"] if row["image_id"] != image["id"]]

        rewrite(path, without_things)

    searched_for([json.loads(path.read_text())["categories"][0]["id"]])
    assert [item.id for item in open_data(address, SIZE)] == [first, *others]  # it teaches what is not there
    searched_for([])
    assert [item.id for item in open_data(address, SIZE)] == others


def test_coco_asked_for_pose_gives_one_person_each(made):
    source = open_data(f"coco:{made('coco')}", SIZE, tasks=["pose"])
    people = json.loads((made("coco") / "annotations" / "person_keypoints_train2017.json").read_text())["annotations"]
    assert len(source) == len(people) and all(len(item.keypoints) == 1 for item in source)
    for item, row in zip(source, people):
        box = item.keypoint_boxes[0]
        assert box[2:].max() == pytest.approx(SIZE / windows.PERSON_MARGIN, rel=0.02)
        joints = np.array(row["keypoints"]).reshape(-1, 3)
        scale = SIZE / (max(row["bbox"][2:]) * windows.PERSON_MARGIN)
        k = int(np.flatnonzero(joints[:, 2])[0])
        middle = np.array(row["bbox"][:2]) + np.array(row["bbox"][2:]) / 2
        assert item.keypoints[0, k, :2] == pytest.approx((joints[k, :2] + 0.5 - middle) * scale + SIZE / 2, abs=0.02)


def test_captions_of_joints_say_the_category_that_has_them(copied):
    root, address = copied("coco")
    assert {item.caption for item in open_data(address, SIZE, tasks=["pose"])} == {"a photo of a person"}
    path = root / "annotations/person_keypoints_train2017.json"
    rewrite(path, lambda d: d["categories"][0].update(name="polar_bear"))
    assert {item.caption for item in open_data(address, SIZE, tasks=["pose"])} == {"a photo of a polar bear"}


def test_limbs_of_coco_are_counted_from_one_and_join_joints():
    assert coco._limbs([[1, 2], [1, 3]], 3) == ((0, 1), (0, 2))
    assert [coco._limbs(limbs, 3) for limbs in ([[1, 4]], [[0, 1]], None)] == [()] * 3


@pytest.mark.parametrize("area", [500.0, None])
def test_a_person_of_coco_has_the_area_that_is_told_or_that_of_its_box(copied, area):
    root, address = copied("coco")
    path = root / "annotations/person_keypoints_train2017.json"
    rewrite(path, lambda d: [row.update(area=area) if area else row.pop("area") for row in d["annotations"]])
    width, height = json.loads(path.read_text())["annotations"][0]["bbox"][2:]
    scale = SIZE / (max(width, height) * windows.PERSON_MARGIN)
    found = open_data(address, SIZE, tasks=["pose"])[0].keypoint_areas
    assert found.tolist() == pytest.approx([(area or width * height) * scale**2], rel=1e-5)


# The similarity exp(-(d / side)^2 / (2 * 0.2^2)) is compared with 0.45 for one joint and 0.65 for seventeen.
@pytest.mark.parametrize(("joints", "nearest", "farthest"), [(1, 31.58, 31.61), (17, 23.19, 23.22)])
def test_a_person_is_centred_whose_mean_joint_is_near_the_middle_of_its_box(copied, joints, nearest, farthest):
    root, address = copied("coco")
    for away in (nearest, farthest):

        def move(document, away=away):
            seen = [150 + away - 0.5, 149.5, 2] * joints + [0, 0, 0] * (17 - joints)
            document["annotations"][0].update(bbox=[100, 120, 100, 60], keypoints=seen, num_keypoints=joints)

        rewrite(root / "annotations/person_keypoints_train2017.json", move)
        assert open_data(address, SIZE, tasks=["pose"]).is_centred(0) == (away == nearest)


def test_crowds_of_coco_are_no_things_to_choose_by_nor_persons_and_classes_go_by_their_ids(tmp_path):
    joints = {"num_keypoints": 1, "keypoints": [4, 4, 2, 0, 0, 0]}
    whole = {"image_id": 5, "bbox": [2, 2, 8, 8], "segmentation": [[2, 2, 10, 2, 10, 10, 2, 10]], **joints}
    rows = [(1, 9, 0, 64), (2, 9, 1, 900), (3, 3, 1, 700), (4, 3, 0, 80)]  # id, category, is a crowd, area
    document = {
        "images": [{"id": 5, "file_name": "a.png", "width": 32, "height": 24}],
        "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "owl", "keypoints": ["eye", "beak"]}],
        "annotations": [{**whole, "id": k, "category_id": kind, "iscrowd": c, "area": a} for k, kind, c, a in rows],
    }
    text(tmp_path / "annotations.json", json.dumps(document))
    save(tmp_path / "a.png", np.zeros((24, 32, 3), np.uint8))
    source = open_data(f"coco:{tmp_path}", SIZE, tasks=["instance", "pose"])
    assert source.thing_classes == ("owl", "cat") and source.areas(0) == {"owl": 80, "cat": 64}
    picture = source.picture(0)
    assert (picture.mask_classes, picture.crowd_classes) == ([1, 0], [1, 0])
    assert picture.keypoint_areas.tolist() == [64, 80]  # in the order of the file


def test_persons_of_one_image_of_coco_are_held_out_together(copied):
    root, address = copied("coco")

    def doubled(document):
        rows = document["annotations"]
        rows += [row | {"id": 1000 * k + row["id"]} for k in range(1, 6) for row in list(rows)]

    rewrite(root / "annotations/person_keypoints_train2017.json", doubled)
    source = open_data(address, SIZE, tasks=["pose"])
    images = [source._image_of(record) for record in source.order]
    for parts in (
        splits.split(source, range(len(source)), 0.3, 0),
        splits.split_folds(source, range(len(source)), 2, 0),
    ):
        sides = [{images[number] for number in part} for part in parts]
        assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert source.origins(0) and not open_data(address, SIZE).origins(0)


def test_a_frame_of_virtual_kitti_is_held_out_in_every_weather(copied, tmp_path):
    root, address = copied("vkitti2")
    for kind in ("Image", "Depth"):
        for scene in sorted((root / kind).iterdir()):
            for weather in ("fog", "rain", "clone", "sunset"):
                shutil.copytree(scene / "15-deg-left", scene / weather)
    source = open_data(address, SIZE)
    assert len(source) == 5 * COUNT
    for parts in (
        splits.split(source, range(len(source)), 0.4, 0),
        splits.split_folds(source, range(len(source)), 3, 0),
    ):
        scenes = [{Path(source.rows[number]).parts[0] for number in part} for part in parts]
        assert all(scenes) and sum(map(len, scenes)) == COUNT
    shutil.copytree(root / "Depth", tmp_path / "both", dirs_exist_ok=True)
    shutil.copytree(root / "Image", tmp_path / "both", dirs_exist_ok=True)
    whole, scene = (open_data(f"vkitti2:{tmp_path}/both{name}", SIZE) for name in ("[Scene01]", "/Scene01"))
    assert len(scene) == 5 and len(open_data(f"vkitti2:{tmp_path}/both/Scene01/fog", SIZE)) == 1
    for number in range(5):
        assert scene.made_of(number) == whole.made_of(number) and scene.filmed_in(number) == whole.filmed_in(number)


def test_frames_of_one_video_are_held_out_together_unless_there_is_only_one(copied):
    root, address = copied("vkitti2")
    for kind in ("Image", "Depth"):
        for path in sorted((root / kind).rglob("*00000.*")):
            for frame in range(1, 6):
                shutil.copy(path, path.with_name(path.name.replace("00000", f"{frame:05d}")))
    source, one = open_data(address, SIZE), open_data(f"{address}[Scene01]", SIZE)
    assert len(source) == 6 * COUNT and len(one) == 6
    numbers = range(len(source))
    for parts in (splits.split(source, numbers, 0.4, 0), splits.split_folds(source, numbers, COUNT, 0)):
        scenes = [{Path(source.rows[number]).parts[0] for number in part} for part in parts]
        assert all(scenes) and sum(map(len, scenes)) == COUNT
    assert sorted(map(len, splits.split_folds(one, range(6), 3, 0))) == [2, 2, 2]
    one = one.subset([*range(6), *range(6)])
    assert {len(part) for part in splits.split(one, range(12), 0.2, 0)} == {2, 10}


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_maps_of_few_bits_hold_class_numbers(copied, bits):
    root, address = copied("folder")
    path = sorted((root / "semantic" if (root / "semantic").is_dir() else root / "masks").iterdir())[0]
    numbers = np.minimum(np.asarray(Image.open(path)), 2**bits - 1)
    Image.fromarray(numbers).save(path)
    before = open_data(address, SIZE)[0].semantic
    save_grey(path, numbers, bits)
    assert (open_data(address, SIZE)[0].semantic == before).all() and before.max() > 1


@pytest.mark.parametrize("bits, white", [(2, 1), (4, 1), (2, 3), (4, 15)])
def test_grey_masks_of_few_bits_show_the_object(copied, bits, white):
    root, address = copied("mask")
    before = open_data(address, SIZE)[0].semantic
    path = next((root / "DIS-TR" / "gt").glob("0#*"))
    save_grey(path, (np.asarray(Image.open(path)) > 127) * np.uint8(white), bits)
    assert (open_data(address, SIZE)[0].semantic == before).all() and before.any()


def save_grey(path, numbers, bits):
    """Writes a PNG file of fewer than 8 bits, as Pillow does not."""
    lines = np.packbits((numbers[..., None] >> np.arange(bits)[::-1] & 1).reshape(len(numbers), -1), axis=1)
    header = struct.pack(">IIBBBBB", *numbers.shape[::-1], bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    packed = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    for kind, part in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
    path.write_bytes(content)


def test_halves_of_characters_are_cleaned_in_captions_and_refused_in_class_names(copied):
    root, address = copied("coco")
    path = root / "annotations/instances_train2017.json"
    rewrite(path, lambda document: document["categories"][0].update(name="ball \ud83d"))
    with pytest.raises(Refused, match=r"the class or joint 'ball .ud83d' is not valid Unicode"):
        open_data(address, SIZE)
    root, address = copied("folder")
    name = sorted(path.name for path in (root / "images").iterdir())[0]
    (root / "captions.json").write_text(json.dumps({name: "a ball \ud83d"}))
    source = open_data(address, SIZE)
    (first, *_) = data_record.record_data(source)["items"]
    assert source[0].caption == "a ball ?" and first["caption"] and first["sides"] == [96, 80]  # width and height


@pytest.mark.parametrize(
    ("name", "path", "sequence"),
    [
        ("nyu", "kitchen_0031b/rgb_00045.jpg", "kitchen_0031"),
        ("nyu", "bathroom/rgb_00045.jpg", ""),
        ("kitti", "2011_09_26/2011_09_26_drive_0002_sync/image_03/data/0000000005.png", "2011_09_26_drive_0002_sync"),
        ("kitti", "2011_09_26/0000000005.png", ""),
    ],
)
def test_the_path_of_a_frame_names_its_video(made, name, path, sequence):
    source = open_data(f"{name}:{made(name)}", SIZE)
    source.rows[0] = (path, "")
    assert source.sequence(0) == sequence


def test_coco_without_the_year_in_its_names_is_read(copied):
    root, address = copied("coco")
    before = [item.id for item in open_data(address, SIZE)]
    for path in [*root.rglob("*train2017*")]:
        path.rename(path.with_name(path.name.replace("train2017", "default")))
    assert [item.id for item in open_data(f"{address}[default]", SIZE)] == before


def as_cvat(root: Path, place) -> None:
    place("annotations/instances_default.json", "images/default")


def as_cvat_with_masks(root: Path, place) -> None:
    """Painted masks are marked as crowds; facts of an image are empty."""

    def change(document):
        for image in document["images"][:-1]:  # the last was added by another program
            image |= {"flickr_url": "", "coco_url": "", "date_captured": 0, "license": 0}
        document["annotations"] = [row for row in document["annotations"] if not row["iscrowd"]]
        for row in document["annotations"]:
            row["iscrowd"] = int(isinstance(row["segmentation"], dict))

    rewrite(place("annotations/instances_default.json", "images/default"), change)


def as_supervision(root: Path, place) -> None:
    """Outlines with holes or of several parts are masks, marked as crowds."""

    def change(document):
        for category in document["categories"]:
            category["supercategory"] = "common-objects"
        document["annotations"] = [row for row in document["annotations"] if not row["iscrowd"]]
        for row in document["annotations"]:
            row["iscrowd"] = int(isinstance(row["segmentation"], dict))

    rewrite(place("annotations.json", "images"), change)


def as_label_studio(root: Path, place) -> None:
    def change(document):
        for number, image in enumerate(document["images"]):  # as it does where pictures were uploaded
            image["file_name"] = f"../../media/upload/3/{image['file_name']}" if number else image["file_name"]

    rewrite(place("result.json", "images"), change)


def as_roboflow(root: Path, place) -> None:
    def change(document):
        """Its category 0 is the project, of which no annotation is."""
        for category in document["categories"]:
            category["supercategory"] = "shapes"
        document["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})

    rewrite(place("train/_annotations.coco.json", "train"), change)
    (root / "valid").mkdir()
    (root / "valid" / "_annotations.coco.json").write_text("{}")


def as_roboflow_of_one_word(root: Path, place) -> None:
    """The project is called as its first class."""

    def change(document):
        name = document["categories"][0]["name"]
        for category in document["categories"]:
            category["supercategory"] = name
        document["categories"].insert(0, {"id": 0, "name": name, "supercategory": "none"})

    rewrite(place("train/_annotations.coco.json", "train"), change)


def as_fiftyone(root: Path, place) -> None:
    place("labels.json", "data")


def as_one_folder(root: Path, place) -> None:
    place("whatever.json", ".")


def as_datumaro(root: Path, place) -> None:
    """Of a data set without splits, which it calls as the file it has read, here CVAT's annotations.xml."""
    place("annotations/instances_annotations.json", "images/annotations")
    for kind in ("image_info", "stuff", "captions"):
        (root / f"annotations/{kind}_annotations.json").write_text("{}")


def as_splits(root: Path, place) -> None:
    place("train.json", "images")
    (root / "val.json").write_text("{}")


EXPORTS_OF_TOOLS = (
    as_cvat,
    as_cvat_with_masks,
    as_supervision,
    as_label_studio,
    as_roboflow,
    as_roboflow_of_one_word,
    as_fiftyone,
    as_one_folder,
    as_datumaro,
    as_splits,
)


@pytest.fixture
def placed(copied):
    """COCO's instances in other files and folders: those of the pictures, and the annotations."""
    root, address = copied("coco")
    (root / "annotations/person_keypoints_train2017.json").unlink()

    def place(annotations: str, pictures: str) -> Path:
        for file in [*(root / "train2017").iterdir()]:
            (root / pictures).mkdir(parents=True, exist_ok=True)
            file.rename(root / pictures / file.name)
        (root / annotations).parent.mkdir(parents=True, exist_ok=True)
        (root / "annotations/instances_train2017.json").rename(root / annotations)
        return root / annotations

    return root, address, place


def same_items(source, before) -> bool:
    assert (source.thing_classes, source.classes) == (before.thing_classes, before.classes)
    return all(
        one.id == other.id and (one.image == other.image).all() and (one.masks == other.masks).all()
        for one, other in zip(source, before, strict=True)
    )


@pytest.mark.parametrize("export", EXPORTS_OF_TOOLS, ids=lambda export: export.__name__.removeprefix("as_"))
def test_coco_is_read_as_tools_export_it(made, placed, export):
    root, address, place = placed
    export(root, place)
    source = open_data(address, SIZE)
    assert same_items(source, open_data(f"coco:{made('coco')}", SIZE, tasks=["instance"]))
    assert source.layout.startswith("annotations of ") and "pictures in " in source.layout


@pytest.mark.parametrize("foreign", ["/home/ann/data/", "C:\\data\\", "../../media/", "shoot/"])
def test_coco_of_foreign_paths_with_equal_names_goes_by_their_longest_end(made, placed, foreign):
    root, address, place = placed
    file, folders = place("result.json", "images"), []

    def change(document):
        for number, image in enumerate(document["images"]):
            folders.append(folder := root / f"images/day/{'hall' if number else 'yard'}{number // 2}")
            folder.mkdir(parents=True, exist_ok=True)
            (root / "images" / image["file_name"]).rename(folder / f"{number % 2}.png")
            image["file_name"] = f"{foreign}day/{folder.name}/{number % 2}.png"
            if "\\" in foreign:
                image["file_name"] = image["file_name"].replace("/", "\\")

    rewrite(file, change)
    source, before = open_data(address, SIZE), open_data(f"coco:{made('coco')}", SIZE, tasks=["instance"])
    assert len(source) > 2 and all((a.image == b.image).all() for a, b in zip(source, before, strict=True))
    for folder in {*folders}:
        for picture in folder.iterdir():
            picture.rename(root / "images" / picture.name)
    with pytest.raises(Refused, match=r"\d of its images, named by .*, would be the picture .*images/[01].png"):
        open_data(address, SIZE)


@pytest.mark.parametrize("change", [lambda row: row.update(segmentation=[]), lambda row: row.pop("segmentation", None)])
def test_a_box_of_coco_without_an_outline_is_ignored_beside_outlines(copied, change):
    """As CVAT exports rectangles."""
    root, address = copied("coco")

    def alter(document):
        row = first_polygon(document)
        row["bbox"] = [3, 5.0, 20, 12]
        change(row)

    before = open_data(address, SIZE, tasks=["instance"]).picture(1)
    rewrite(root / "annotations/instances_train2017.json", alter)
    after = open_data(address, SIZE, tasks=["instance"]).picture(1)
    assert (len(after.masks), len(after.crowds)) == (len(before.masks) - 1, len(before.crowds) + 1)
    (mask,) = [mask for make in after.crowds if (mask := make()).sum() == 20 * 12]
    assert mask[5:17, 3:23].all()
    rewrite(root / "annotations/instances_train2017.json", lambda d: [change(row) for row in d["annotations"]])
    with pytest.raises(Refused, match="no segmentation"):
        open_data(address, SIZE, tasks=["instance"]).picture(1)


@pytest.mark.parametrize(("used", "shown"), [([1], [1]), ([0, 1], [0, 1])])
def test_a_root_of_roboflow_is_a_class_where_annotations_are_of_it(tmp_path, used, shown):
    names = ((0, "toys", "none"), (1, "ball", "toys"))
    document = {
        "images": [{"id": 1, "width": 8, "height": 8, "file_name": "a.png"}],
        "categories": [{"id": k, "name": name, "supercategory": parent} for k, name, parent in names],
        "annotations": [{"id": k, "image_id": 1, "category_id": k} for k in used],
    }
    text(tmp_path / "a.json", json.dumps(document))
    assert coco.Annotations(tmp_path / "a.json").shown_categories == shown


@pytest.mark.parametrize(("number", "is_taken"), [(-(2**63), True), (2**63 - 1, True), (2**63, False)])
def test_ids_of_annotations_have_64_bits(tmp_path, number, is_taken):
    image = {"id": 1, "width": 8, "height": 8, "file_name": "a.png"}
    annotations = [{"id": number, "image_id": 1, "category_id": 3}]
    document = {"images": [image], "categories": [{"id": 3, "name": "mug"}], "annotations": annotations}
    text(tmp_path / "a.json", json.dumps(document))
    with nullcontext() if is_taken else pytest.raises(Refused, match="an id of more than 64 bits"):
        assert coco.Annotations(tmp_path / "a.json").rows["id"].tolist() == [number]


def test_categories_of_one_name_are_refused(copied):
    root, address = copied("coco")
    path = root / "annotations/instances_train2017.json"
    rewrite(path, lambda d: d["categories"][1].update(name=d["categories"][0]["name"]))
    with pytest.raises(Refused, match="the category '.*' occurs twice"):
        open_data(address, SIZE, tasks=["instance"])


def test_many_categories_are_compared_by_name_at_once(tmp_path):
    annotations = object.__new__(coco.Annotations)
    annotations.path, annotations.rows = tmp_path / "a.json", {name: [] for name in ("id", "image", "category")}
    annotations.images, annotations.categories = {}, {k: f"kind{k}" for k in range(15_000)}
    annotations.parents = dict.fromkeys(annotations.categories)
    begin = time.process_time()
    annotations._check_ids()
    assert time.process_time() - begin < 1  # 0.02 s; each with each takes 7 s


@pytest.mark.parametrize("place", ["", "images"])
def test_files_of_coco_find_the_pictures_of_their_year(copied, place):
    root, address = copied("coco")
    before = open_data(address, SIZE, tasks=["instance"])[0].image
    (root / place).mkdir(exist_ok=True)
    (root / "train2017").rename(root / place / "train2017")
    source = open_data(f"coco:{root}/annotations/instances_train2017.json", SIZE)
    assert (source[0].image == before).all()


@pytest.mark.parametrize("named", ["labels.json", "labels.json:photos"])
def test_a_file_of_coco_may_be_named_with_or_without_its_pictures(made, placed, named):
    root, _, place = placed
    place("labels.json", "photos" if ":" in named else "data")
    if ":" in named:  # the two paths of FiftyOne
        named = f"labels.json:{root}/photos"
    before = open_data(f"coco:{made('coco')}", SIZE, tasks=["instance"])
    assert same_items(open_data(f"coco:{root}/{named}", SIZE), before)


def test_splits_of_tools_are_found_by_their_names(placed):
    root, address, place = placed
    as_roboflow(root, place)
    shutil.rmtree(root / "valid")
    (root / "train").rename(root / "valid")
    assert len(open_data(f"{address}[val]", SIZE)) == 3
    with pytest.raises(Refused, match="no COCO annotations of the split 'test', but of valid") as stop:
        open_data(f"{address}[test]", SIZE)
    assert "Roboflow" in stop.value.remedy and "FiftyOne" in stop.value.remedy


@pytest.mark.parametrize(
    "names", [("labels.json", "result.json"), ("person_keypoints.json", "person_keypoints_default.json")]
)
def test_several_files_that_may_be_the_annotations_are_refused(placed, names):
    root, address, place = placed
    file = place(names[0], "data")
    shutil.copy(file, root / names[1])
    with pytest.raises(Refused, match=f"several files may be its annotations: {', '.join(names)}"):
        open_data(address, SIZE)


def test_annotations_without_any_of_their_pictures_say_where_they_were_looked_for(placed):
    root, address, place = placed
    place("labels.json", "elsewhere")
    with pytest.raises(Refused, match="none of its pictures is there, such as .*looked in .*data") as stop:
        open_data(address, SIZE)
    assert stop.value.remedy.endswith("labels.json:PICTURES.")


def test_areas_that_coco_does_not_tell_are_those_of_the_masks(copied):
    root, address = copied("coco")
    chosen = Selection(per_class=1, min_area=40)
    before = [item.id for item in open_data(address, SIZE, tasks=["instance"], selection=chosen)]
    rewrite(root / "annotations/instances_train2017.json", lambda d: [row.pop("area") for row in d["annotations"]])
    assert [item.id for item in open_data(address, SIZE, tasks=["instance"], selection=chosen)] == before


def test_cityscapes_label_ids_become_train_ids(copied):
    root, address = copied("cityscapes")
    with_train_ids = open_data(address, SIZE)[0].semantic
    from datasetdm_fast.training.readers.cityscapes import TRAIN_IDS

    back = np.zeros(256, np.uint8)
    back[list(TRAIN_IDS.values())] = list(TRAIN_IDS)
    for path in list(root.rglob("*labelTrainIds.png")):
        numbers = np.asarray(Image.open(path))
        save(
            path.with_name(path.name.replace("labelTrainIds", "labelIds")),
            np.where(numbers == 255, 0, back[numbers]).astype(np.uint8),
        )
        path.unlink()
    assert (open_data(address, SIZE)[0].semantic == with_train_ids).all()
    for path in list(root.rglob("*labelIds.png")):  # which count where there are no others alone
        own = np.full(np.asarray(Image.open(path)).shape, 13, np.uint8)
        save(path.with_name(path.name.replace("labelIds", "labelTrainIds")), own)
    assert (open_data(address, SIZE)[0].semantic == 13).all()


CITY_LABELS = {  # classes in the order of their train ids, with their label ids, as cityscapesScripts has them
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}


def test_classes_of_cityscapes_have_its_numbers():
    names, numbers = tuple(CITY_LABELS), tuple(CITY_LABELS.values())
    assert names == cityscapes.CITYSCAPES_CLASSES and names[11:] == cityscapes.Cityscapes.thing_classes
    assert cityscapes.TRAIN_IDS == {number: k for k, number in enumerate(numbers)} and numbers == LABEL_IDS


def test_instances_of_cityscapes_are_things_and_those_without_a_number_crowds(tmp_path):
    place = SimpleNamespace(_label_file=lambda path, kind: tmp_path / f"{kind}.png")
    save(tmp_path / "instanceIds.png", np.uint16([[33001, 24, 7, 26000, 26001, 40]]))
    found = cityscapes.Cityscapes._things(place, Path("a.png"), (1, 6))
    assert (found.mask_classes, found.crowd_classes) == ([2, 2, 7], [0])  # cars, a bicycle; persons
    assert [make()[0].tolist() for make in found.masks] == [[k == at for k in range(6)] for at in (3, 4, 0)]
    assert found.crowds[0]()[0].tolist() == [k == 1 for k in range(6)]
    save(tmp_path / "instanceIds.png", np.uint16([[34001] * 6]))
    with pytest.raises(Refused, match="the unknown class 34 of instance 34001"):
        cityscapes.Cityscapes._things(place, Path("a.png"), (1, 6))


def test_groups_of_cityscapes_are_crowds(copied):
    root, address = copied("cityscapes")
    path = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png"
    numbers, before = np.asarray(Image.open(path)), open_data(address, 48)[0]
    save(path, np.where(numbers == numbers.max(), 26, numbers).astype(np.uint16))
    source = open_data(address, 48)
    item = source[0]
    assert len(item.masks) == len(before.masks) - 1 and (item.crowds[0] == before.masks[-1]).all()
    assert [source.thing_classes[k] for k in item.crowd_classes] == ["car"]


def test_splits_are_named_in_brackets(made):
    assert len(open_data(f"voc:{made('voc')}[val]", SIZE)) == COUNT
    assert [item.id for item in open_data(f"vkitti2:{made('vkitti2')}[Scene02]", SIZE)] == [
        "Scene02_15-deg-left_frames_rgb_Camera_0_rgb_00000"
    ]
    with pytest.raises(Refused, match="test"):
        open_data(f"voc:{made('voc')}[test]", SIZE)
    with pytest.raises(Refused, match="Scene77"):
        open_data(f"vkitti2:{made('vkitti2')}[Scene77]", SIZE)


def test_a_task_without_truth_is_refused(made):
    with pytest.raises(Refused, match="no ground truth for depth"):
        open_data(f"voc:{made('voc')}", SIZE, tasks=["depth"])


# Framing --------------------------------------------------------------------------------------------------------------


def ramp(height: int, width: int) -> Picture:
    """A picture whose red says the column and whose green the row; its label map is brighter than half."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.linspace(0, 255, width)[None], np.linspace(0, 255, height)[:, None]
    return Picture("ramp", image, "", semantic=(image[..., 0] > 127).astype(np.uint8))


def test_new_pixels_are_those_under_their_middle_and_persons_move_with_them():
    assert framing._nearest(5, 0.0, 0.6, 3).tolist() == [0, 2, 4]
    assert framing._nearest(4, -1.0, 1.0, 6).tolist() == [-1, 0, 1, 2, 3, -1]
    assert framing._nearest(118, 0.0, 3 / 118, 3).tolist() == [19, 59, 98]  # 59.0, whatever the product rounds to
    points = [[[6, 8, 2], [18, 4, 1], [17.9, 4, 1]], [[40, 8, 2]] * 3, [[2, 4, 1], [1.9, 4, 2], [2, 3.9, 2]]]
    people = {"keypoints": np.float32(points), "keypoint_areas": np.float32([100, 1, 40])}
    people["keypoint_boxes"] = np.float32([[0, 0, 30, 30], [0, 0, 9, 9], [6, 8, 4, 6]])
    picture = Picture("a", np.zeros((64, 64, 3), np.uint8), "", **people)
    found = framing._frame_persons(picture, framing.Window(2, 4, 0.5), 8)
    assert found["keypoints"][..., 2].tolist() == [[2, 0, 1], [1, 0, 0]]  # the second one is out of sight
    assert found["keypoints"][0, :, :2].tolist() == [[2, 2], [8, 0], [pytest.approx(7.95), 0]]
    assert found["keypoint_boxes"].tolist() == [[0, 0, 8, 8], [2, 2, 2, 3]]
    assert found["keypoint_areas"].tolist() == [25, 10]


@pytest.mark.parametrize("height, width", [(64, 64), (64, 200), (333, 97), (16, 500), (1000, 40), (47, 65)])
def test_any_shape_is_fitted_by_its_shorter_side(height, width):
    picture = ramp(height, width)
    item = framing.frame_picture(picture, framing.fit_window(height, width, SIZE), SIZE)
    side = min(height, width)
    spread = 255 * side / width
    assert item.image[SIZE // 2, -1, 0] - int(item.image[SIZE // 2, 0, 0]) == pytest.approx(spread, abs=spread / 16 + 4)
    assert (item.semantic == (item.image[..., 0] > 127)).mean() > 0.95 and (item.semantic != 255).all()
    assert framing.fit_window(64, 97, 32) == framing.Window(16.5, 0, 0.5)
    assert framing.fit_window(97, 64, 128) == framing.Window(0, 16.5, 2)


def test_a_first_class_that_is_the_background_is_called_so_and_is_no_thing():
    for name in ("background", "Background", "_background_", "BACKGROUND"):
        assert reading.with_background([name, "cup"]) == ("background", "cup")
    assert reading.with_background(["Background", "background"]) == ("Background", "background")
    assert reading.with_background(["cup", "Background"]) == ("cup", "Background")
    assert reading.without_background(("none", "cup", "background")) == ("cup", "background")


def test_files_of_a_folder_are_found_in_order_without_those_that_systems_hide(tmp_path):
    for name in ("b/c.PNG", "b.jpg", "a/d.png", "a/._d.png", ".hidden.png", "a/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = reading.listing(tmp_path, ".png", ".jpg")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a/d.png", "b/c.PNG", "b.jpg"]
    assert reading.names_of(tmp_path, found) == ["a/d", "b/c", "b"]
    assert reading.label_file(tmp_path / "b", "c", ".png").name == "c.PNG"  # a label in capitals is one too
    assert reading.label_file(tmp_path / "a", "d", ".png").name == "d.png"


@pytest.mark.parametrize("name", LAYOUTS)
def test_captions_made_of_labels_name_what_a_crop_leaves(made, name):
    """The whole of a picture is named, and of the square in its middle what is there."""
    source = open_data(f"{LAYOUTS[name][0]}:{made(name)}", SIZE)
    if not isinstance(source, PictureSource):
        return
    picture, item = source.picture(0), source[0]
    if picture.named is None:
        assert item.caption == picture.caption
        return
    assert whole_item(source, 0).caption == source.photo_of(picture.named)
    shown = {name for name, _ in source.things_of(item)}
    shown |= {*picture.named}.difference(source.classes, source.thing_classes)  # as files of masks name their object
    if item.semantic is not None:
        shown |= {source.classes[k] for k in np.unique(item.semantic) if k != IGNORE}
    assert item.caption == source.photo_of([name for name in picture.named if name in shown])


def test_fashion_without_captions_is_captioned_by_what_its_maps_show(copied):
    root, address = copied("deepfashion-mm")
    path = min((root / "segm").iterdir())
    labels = np.array(Image.open(path))
    labels[:20, :20] = 23  # the last class
    save(path, labels)
    stored = [item.semantic for item in open_data(address, SIZE)]
    captions = [item.caption for item in open_data(address, SIZE)]
    assert any((labels == 23).any() for labels in stored)
    told = json.loads((root / "captions.json").read_text())
    text(root / "captions.json", json.dumps({Path(name).stem: caption for name, caption in told.items()}))
    assert [item.caption for item in open_data(address, SIZE)] == captions
    (root / "captions.json").unlink()
    source = open_data(address, SIZE)
    assert source.captions_name_all
    for item, labels in zip(source, stored, strict=True):
        shown = {source.classes[k] for k in np.unique(labels) if 0 < k < 255}
        assert {*item.named} == shown and shown and "background" not in item.caption


@pytest.mark.parametrize("captions", [None, {"0": "a dog beside a cat"}])
def test_what_a_square_cuts_away_is_named_by_given_captions_alone(tmp_path, captions):
    labels = np.zeros((32, 96), np.uint8)
    labels[:, :8], labels[8:24, 40:56] = 1, 2
    save(tmp_path / "images" / "0.png", np.zeros((32, 96, 3), np.uint8))
    save(tmp_path / "masks" / "0.png", labels)
    (tmp_path / "classes.txt").write_text("background\ndog\ncat\n")
    if captions:
        (tmp_path / "captions.json").write_text(json.dumps(captions))
    source = open_data(f"folder:{tmp_path}", 64)
    assert whole_item(source, 0).caption in (
        (captions or {}).get("0"),
        "a photo of a cat, a dog",
        "a photo of a dog, a cat",
    )
    assert source[0].caption == ("a dog beside a cat" if captions else "a photo of a cat")
    zoomed = [augment(source, 0, Augmentation(zoom=16), draw, 0, source.__getitem__).caption for draw in range(12)]
    assert {*zoomed} == ({"a dog beside a cat"} if captions else {"a photo of a cat", "a photo"})


def test_captions_made_of_labels_name_the_classes_in_an_order_of_each_picture():
    named = [Picture(f"{k:04d}", np.zeros((16, 16, 3), np.uint8), ("dog", "cat", "owl")).named for k in range(60)]
    assert (
        len({*named}) == 6 and named[0] == Picture("0000", np.zeros((16, 16, 3), np.uint8), ("dog", "cat", "owl")).named
    )


def test_captions_made_of_labels_follow_what_a_look_pastes_and_mirrors(tmp_path):
    maps = [np.zeros((64, 64), np.uint8) for _ in range(2)]
    maps[0][8:24, 40:56], maps[1][:, 8:] = 1, 2
    for number, labels in enumerate(maps):
        save(tmp_path / "images" / f"{number}.png", np.zeros((64, 64, 3), np.uint8))
        save(tmp_path / "masks" / f"{number}.png", labels)
    (tmp_path / "classes.txt").write_text("background\nleft hand\ncat\nright hand\n")
    source = open_data(f"folder:{tmp_path}", 64)

    def said(how, draw, others=()):
        return augment(source, 0, how, draw, 0, source.__getitem__, others).caption

    assert said(Augmentation(flip=True), 0) == "a photo of a left hand"
    assert said(Augmentation(flip=True), 1) == "a photo of a right hand"
    assert said(Augmentation(pasted=1.0), 0, (1,)) == "a photo of a cat"  # which covers the hand
    assert said(Augmentation(flip=True, pasted=1.0), 1, (1,)) in ("a photo of a cat", "a photo of a right hand, a cat")


def test_the_object_of_a_binary_mask_is_named_only_where_the_square_shows_it(tmp_path):
    for name, columns in (("1#A#2#Chair#3", slice(0, 8)), ("2#A#2#Sofa#4", slice(44, 52))):
        mask = np.zeros((32, 96), np.uint8)
        mask[:, columns] = 255
        save(tmp_path / "im" / f"{name}.png", np.zeros((32, 96, 3), np.uint8))
        save(tmp_path / "gt" / f"{name}.png", mask)
    save(tmp_path / "im" / "3#A#2#pin#5.png", np.zeros((128, 128, 3), np.uint8))
    save(tmp_path / "gt" / "3#A#2#pin#5.png", np.pad(np.full((1, 1), 255, np.uint8), (0, 127)))  # falls between pixels
    source = open_data(f"mask:{tmp_path}", 64)
    assert [whole_item(source, index).caption for index in range(3)] == [
        f"a photo of a {it}" for it in ("chair", "sofa", "pin")
    ]
    assert [item.caption for item in source] == ["a photo", "a photo of a sofa", "a photo"]
    for folder in ("im", "gt"):
        (tmp_path / folder / "2#A#2#Sofa#4.png").rename(tmp_path / folder / "2#A#2#4.png")  # no name of DIS5K
    assert whole_item(open_data(f"mask:{tmp_path}", 64), 1).caption == "a photo of a object"


def test_upstreams_windows_lie_inside_and_depend_on_the_seed_alone():
    for rule in windows.RULES.values():
        for height, width in ((375, 500), (64, 64), (40, 900), (49, 70)):  # 64 / (64 / 49) is more than 49
            picture = ramp(height, width)
            places = [windows.draw_window(rule, picture, SIZE, seed) for seed in range(40)]
            assert places == [windows.draw_window(rule, picture, SIZE, seed) for seed in range(40)]
            for window in places:
                side = SIZE / window.scale
                assert -1e-6 <= window.left <= width - side + 1e-6 and -1e-6 <= window.top <= height - side + 1e-6
    scales = {
        windows.draw_window(windows.RULES["voc"], ramp(1000, 1000), SIZE, seed).scale * 512 / SIZE for seed in range(60)
    }
    assert {round(scale, 3) for scale in scales} == {
        0.512,
        0.8,
        1,
        1.3,
        1.8,
        2,
        3,
    }  # half of 1000 pixels would be smaller than the window


def test_upstreams_windows_by_its_rules():
    scales = {name: rule.scales for name, rule in windows.RULES.items() if rule.scales != (1.0,)}
    half = (0.5, 0.8, 1, 1.3, 1.8)
    assert scales == {
        "voc": (*half, 2, 3),
        "cityscapes": half,
        "deepfashion": half,
        "vkitti2": (*half, 2),
        "nyu": (*half, 2, 2.5),
    }
    assert {name: rule.shortest for name, rule in windows.RULES.items() if rule.shortest} == {
        "coco": (532, 832),
        "kitti": (512, 512),
    }
    toward = {name: rule.toward_object for name, rule in windows.RULES.items() if rule.toward_object}
    assert toward == {"voc": 0.625, "cityscapes": 0.625, "deepfashion": 0.625}
    assert windows.around((10, 20, 30, 40), 64) == windows.Window(25 - 25, 40 - 25, 64 / 50)
    assert windows.around((10, 20, 60, 40), 64, 1.2) == windows.Window(40 - 45, 40 - 45, 64 / 90)
    assert windows.around((3, 4, 0, 0), 64) == windows.Window(3 - 0.625, 4 - 0.625, 64 / 1.25)  # a point has a pixel


def test_a_window_of_upstream_is_drawn_from_its_seed():
    labels = np.zeros((300, 500), np.int64)
    labels[200:260, 30:50], labels[10:40, 400:440], labels[280:, 480:] = 3, 7, 255
    picture = SimpleNamespace(image=np.zeros((300, 500, 3), np.uint8), semantic=labels, person=None)
    centres = {3: (39.5, 229.5), 7: (419.5, 24.5)}  # of their columns and rows
    rule, drawn = windows.Rule(scales=(0.5, 2.0, 3.0), toward_object=0.5), 0
    for seed in range(30):
        random = np.random.default_rng(seed)
        scale = max(rule.scales[random.integers(3)] * 64 / 512, 64 / 300)
        side = min(64 / scale, 300)
        left, top = random.uniform(0, 500 - side), random.uniform(0, 300 - side)
        if random.random() < 0.5:
            drawn += 1
            column, row = centres[random.choice([3, 7])]
            left = np.clip(random.uniform(column - side, column), 0, 500 - side)
            top = np.clip(random.uniform(row - side, row), 0, 300 - side)
        assert windows.draw_window(rule, picture, 64, seed) == windows.Window(left, top, scale)
        random = np.random.default_rng(seed)
        scale = random.integers(532, 833) / 512 * 64 / 300
        left, top = random.uniform(0, 500 - 64 / scale), random.uniform(0, 300 - 64 / scale)
        found = windows.draw_window(windows.RULES["coco"], picture, 64, seed)
        assert (found.left, found.top, found.scale) == pytest.approx((left, top, scale))
        more = float(np.clip(1 + 0.3 * np.random.default_rng(seed).standard_normal(), 0.7, 1.3))
        person = SimpleNamespace(image=picture.image, semantic=labels, person=(10, 20, 30, 40))
        assert windows.draw_window(rule, person, 64, seed) == windows.around((10, 20, 30, 40), 64, more)
    assert 8 < drawn < 22
    for nothing in (None, np.full((300, 500), 255)):
        empty = SimpleNamespace(image=picture.image, semantic=nothing, person=None)
        towards = windows.Rule(toward_object=1.0)
        assert windows.draw_window(towards, empty, 64, 1) == windows.draw_window(windows.Rule(), empty, 64, 1)


def test_what_lies_outside_the_picture_is_black_and_ignored():
    picture = replace(ramp(50, 50), depth=np.full((50, 50), 2.5, np.float32))
    item = framing.frame_picture(picture, framing.Window(-50, 0, SIZE / 100), SIZE)
    assert (item.depth[: SIZE // 2, SIZE // 2 :] == 2.5).all() and item.depth.sum() == 2.5 * SIZE**2 / 4  # 0 is unknown
    assert (
        not item.image[:, : SIZE // 2].any()
        and not item.image[SIZE // 2 :].any()
        and item.image[: SIZE // 2, SIZE // 2 + 4 :].any(-1).all()
    )
    assert (item.semantic[:, : SIZE // 2] == 255).all() and (item.semantic[: SIZE // 2, SIZE // 2 :] != 255).all()
    above = framing.frame_picture(picture, framing.Window(0, -50, SIZE / 100), SIZE)
    assert (above.semantic[: SIZE // 2] == 255).all() and (above.semantic[SIZE // 2 :, : SIZE // 2] != 255).all()
    assert not above.image[: SIZE // 2].any() and above.image[SIZE // 2 + 4 :, 4 : SIZE // 2].any(-1).all()


def test_masks_are_drawn_into_one_map_from_the_largest_to_the_smallest():
    masks = np.arange(9) < np.array([4, 9, 1, 9])[:, None]
    assert largest_first(masks) == [1, 3, 0, 2]


def test_a_map_that_is_drawn_of_masks_shows_small_ones_and_ignores_crowds():
    source = PictureSource(4, 1)
    source.classes, source.thing_classes, source.tasks = ("background", "a", "b"), ("a", "b"), ("semantic",)
    masks, crowds = np.zeros((2, 4, 4), bool), np.zeros((1, 4, 4), bool)
    masks[0, 0, 0], masks[1, :2], crowds[0, :, 0] = True, True, True
    facts = {"image": np.zeros((4, 4, 3), np.uint8), "masks": masks, "mask_classes": np.array([0, 1])}
    item = replace(open_data("demo:1@900000", SIZE)[0], semantic=None, crowds=crowds, named=None, **facts)
    labels = [[1, 2, 2, 2], [2, 2, 2, 2], [255, 0, 0, 0], [255, 0, 0, 0]]
    assert source.complete(item).semantic.tolist() == labels
    cut = replace(item, semantic=np.uint8([[0, 1]]), masks=None, mask_classes=None, named=("b", "a"))
    assert source.with_caption(cut).caption == source.photo_of(("a",)) and source.with_caption(cut).named == ("a",)
    back = source.complete(replace(item, semantic=np.uint8(labels), masks=None))
    assert back.mask_classes.tolist() == [0, 1] and (back.masks == (np.uint8(labels) == [[[1]], [[2]]])).all()


def test_framing_by_upstreams_rule_is_repeatable(made):
    plain, drawn = (open_data(f"coco:{made('coco')}", SIZE, framing=kind) for kind in ("fit", "upstream"))
    assert (drawn[1].image == drawn[1].image).all() and (drawn[1].image != plain[1].image).any()
    assert (plain.draw_view(1, 7).image != plain.draw_view(1, 8).image).any() and (
        plain.draw_view(1, 7).image == plain.draw_view(1, 7).image
    ).all()


# Selection ------------------------------------------------------------------------------------------------------------


def test_limits_per_class_count_each_image_once():
    source = open_data("demo:60@0", SIZE, selection=Selection(per_class=2, min_area=60))
    counts = dict.fromkeys(source.thing_classes, 0)
    everything = open_data("demo:60@0", SIZE)
    for record in source.order:
        areas = everything.areas(record)
        first = next(name for name in source.thing_classes if areas.get(name, 0) > 60 and counts[name] < 2)
        counts[first] += 1
    assert max(counts.values()) == 2 and len(source) == sum(counts.values()) >= 10


def test_zero_shot_images_show_no_unseen_class():
    seen = ("ball", "cube", "cone")
    source = open_data("demo:60@0", SIZE, selection=Selection(per_class=4, classes=seen))
    assert len(source) >= 6
    for item in source:
        assert {source.thing_classes[k] for k in item.mask_classes} <= set(seen)


def test_a_class_counts_where_it_covers_more_than_the_least_area():
    source = open_data("demo:1@0", SIZE)
    largest = max(source.areas(0).values())
    assert len(open_data("demo:1@0", SIZE, selection=Selection(min_area=largest - 1))) == 1
    with pytest.raises(Refused, match="none of 1 images is chosen"):
        open_data("demo:1@0", SIZE, selection=Selection(min_area=largest))


def test_a_path_is_compared_without_an_ending_of_up_to_four_letters():
    for path, parts in (
        ("a\\b/c.jpeg", ("a", "b", "c")),
        ("./c.d.PNG", ("c.d",)),
        ("c.jpeg2", ("c.jpeg2",)),
        (".jpg", (".jpg",)),
        ("c.", ("c",)),
    ):
        assert selection_of_images._parts(path) == parts


def test_a_long_tail_has_its_own_limit():
    source = open_data("demo:200@0", SIZE, selection=Selection(per_class=9, tail=("ring", "star"), tail_per_class=1))
    plain = open_data("demo:200@0", SIZE, selection=Selection(per_class=9))
    assert len(source) == len(plain) - 16


def test_single_class_images_and_totals():
    single = open_data("demo:60@0", SIZE, selection=Selection(is_single=True, most=5))
    assert len(single) == 5 and all(len(set(item.mask_classes)) == 1 for item in single)
    shuffled = open_data("demo:60@0", SIZE, selection=Selection(is_shuffled=True, most=5))
    assert list(shuffled.order) != list(range(5)) and list(shuffled.order) == list(
        open_data("demo:60@0", SIZE, selection=Selection(is_shuffled=True, most=5)).order
    )


def test_cityscapes_selection_counts_all_classes_of_the_map(made):
    address, chosen = f"cityscapes:{made('cityscapes')}", DataSettings(select="cityscapes", limit_per_class=1)
    many = replace(chosen.selection(), min_area=900)  # pixels; only the road and the sidewalk cover more
    assert len(open_data(address, SIZE, selection=many)) == 2
    with pytest.raises(Refused, match="none of 3 images"):
        open_data(address, SIZE, selection=replace(many, by_map=False))


def test_upstreams_values_are_presets_and_flags_change_them():
    assert PRESETS["voc-long-tail"].tail == (
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    )
    assert PRESETS["voc-zero-shot"].classes[-1] == "person" and len(PRESETS["voc-zero-shot"].classes) == 15
    chosen = DataSettings(select="coco", limit_per_class=10).selection()
    assert (chosen.per_class, chosen.min_area, chosen.min_instance) == (10, 10000, 500)
    wanted = {
        "voc": Selection(per_class=11, min_area=18000, is_single=True),
        "voc-zero-shot": Selection(per_class=30, min_area=18000, classes=PRESETS["voc-zero-shot"].classes),
        "voc-long-tail": Selection(per_class=20, min_area=18000, tail=PRESETS["voc-long-tail"].tail, tail_per_class=2),
        "cityscapes": Selection(per_class=10, min_area=10000, by_map=True),
        "deepfashion": Selection(per_class=5),
        "coco": Selection(per_class=50, min_area=10000, min_instance=500),
        "lvis": Selection(per_class=1, min_area=50, min_instance=500),
        "kitti": Selection(most=200, is_shuffled=True),
        "vkitti2": Selection(),
        "nyu": Selection(most=250, is_shuffled=True),
        "coco-pose": Selection(most=800, is_centred=True),
    }
    assert wanted == PRESETS and Selection().is_everything and Selection().seed == 42
    assert DataSettings().selection() == Selection() == Selection(0, 0, 0, (), False, False, (), 0, False, False, 0)
    asked = DataSettings(select="voc", min_area=9, limit_images=3, only_classes=("a",)).selection()
    assert asked == Selection(per_class=11, min_area=9, most=3, classes=("a",), is_single=True)
    assert least_mask(Selection(min_instance=512), 64) == 8 and least_mask(Selection(min_instance=32), 64) == 1


@pytest.mark.parametrize(
    ("chosen", "flag"),
    [
        (Selection(per_class=2), "--limit-per-class"),
        (Selection(min_area=9), "--min-area"),
        (Selection(classes=("ball",)), "--only-classes"),
    ],
)
def test_data_without_classes_are_not_chosen_by_class(made, chosen, flag):
    with pytest.raises(Refused, match=f"names no classes, by which {flag} or --select would choose") as stop:
        open_data(f"nyu:{made('nyu')}", SIZE, selection=chosen)
    assert stop.value.remedy == "Choose by --limit-images or --images."
    assert len(open_data(f"nyu:{made('nyu')}", SIZE, selection=Selection(most=1))) == 1


def test_small_instances_are_dropped_where_asked(made):
    address = f"coco:{made('coco')}"
    least = 250  # pixels at the model's size; the cone of the first has fewer
    items = list(open_data(address, SIZE, selection=Selection(min_instance=least * (512 // SIZE) ** 2)))
    everything = list(open_data(address, SIZE))
    named = [{*found[0].named} for found in (everything, items)]
    assert named == [{"cube", "cone", "person"}, {"cube", "person"}]
    assert (
        min(mask.sum() for item in items for mask in item.masks)
        >= least
        > min(mask.sum() for item in everything for mask in item.masks)
    )


def test_a_selection_that_chooses_nothing_or_names_nothing_is_refused(made):
    with pytest.raises(Refused, match="none of 3"):
        open_data(f"voc:{made('voc')}", SIZE, selection=Selection(per_class=1, min_area=10**6))
    with pytest.raises(Refused, match="no class 'unicorn'"):
        open_data("demo:3", SIZE, selection=Selection(classes=("unicorn",)))


LISTS = {
    "one path a line": "./data/PascalVOC12/JPEGImages/2007_000002.jpg\n\n/elsewhere/2007_000000.jpg\n2007_000002\n",
    "a Python list": "['./data/JPEGImages/2007_000002.jpg', \"JPEGImages/2007_000000.jpg\", '2007_000002.jpg']",
    "lines of a list cut up by hand": "./data/2007_000002.jpg\n2007_000000.jpg', './data/2007_000002.jpg']",
    "slashes of Windows": "\ufeffD:\\voc\\JPEGImages\\2007_000002.jpg\r\nd:\\2007_000000.jpg\r\n",
}


@pytest.mark.parametrize("what", LISTS)
def test_exactly_the_images_of_a_list_are_taken(made, tmp_path, what):
    (tmp_path / "list.txt").write_text(LISTS[what], encoding="utf-8")
    selection = DataSettings(images=str(tmp_path / "list.txt")).selection()
    source = open_data(f"voc:{made('voc')}", SIZE, selection=selection)
    assert [item.id for item in source] == ["2007_000002", "2007_000000"]
    assert len(open_data(f"voc:{made('voc')}", SIZE, selection=replace(selection, most=1))) == 1


def test_an_ending_may_be_left_out_of_names_with_dots(copied):
    root, address = copied("folder")
    (root / "captions.json").unlink()
    for number, name in enumerate(("frame", "frame.9", "frame.10")):
        for kind in ("images", "masks", "depth"):
            (root / kind / f"scene {number}.png").rename(root / kind / f"{name}.png")
    for said in ("frame", "frame.9", "frame.10", "images/frame.10", "frame.9.png", "frame.10.jpg"):
        (item,) = open_data(address, SIZE, selection=Selection(images=(said,)))
        assert item.id == said.removeprefix("images/").removesuffix(".png").removesuffix(".jpg")


def test_images_of_one_name_are_told_by_their_folders(copied):
    root, address = copied("folder")
    for day in range(2):
        for kind in ("images", "masks", "depth"):
            (root / kind / f"day {day}").mkdir()
            (root / kind / f"scene {day}.png").rename(root / kind / f"day {day}" / "1.png")
    source = open_data(address, SIZE, selection=Selection(images=("./data/day 1/1.png", "scene 2")))
    assert [item.id for item in source] == ["day 1/1", "scene 2"]
    with pytest.raises(Refused, match="may be 2 images"):
        open_data(address, SIZE, selection=Selection(images=("1.png",)))
    with pytest.raises(Refused, match="no image 'night/7.png' and 1 more"):
        open_data(address, SIZE, selection=Selection(images=("night/7.png", "scene 2.png", "8")))


def test_records_without_a_file_are_listed_by_id(made):
    assert [item.id for item in open_data("demo:9@5", SIZE, selection=Selection(images=("7", "5")))] == ["7", "5"]
    assert [item.id for item in open_data(f"run:{made('run')}", SIZE, selection=Selection(images=("00000002",)))] == [
        "00000002"
    ]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "no path"),
        (b"[]", "no path"),
        (b"['a.jpg', 3]", "expected text"),
        (b"['a.jpg'", "no list of paths"),
        (b"[__import__('os').system('true')]", "no list of paths"),
        (b"[" * 100_000, "no list of paths"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_what_is_no_list_of_images_is_refused(tmp_path, content, said):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(Refused, match=said) as stop:
        DataSettings(images=str(tmp_path / "list")).selection()
    assert stop.value.exit_code == 2 and "\n" not in stop.value.cause


def test_a_list_of_images_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("datasetdm_fast.training.truth.selection.LARGEST_IMAGE_LIST", 3)
    (tmp_path / "list").write_text("a.jpg")
    with pytest.raises(Refused, match="5 bytes, at most 3 are read") as stop:
        DataSettings(images=str(tmp_path / "list")).selection()
    assert "no list of paths" not in stop.value.cause


def test_a_list_of_images_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(Refused, match="--images .*list.txt: no such file"):
        DataSettings(images=str(tmp_path / "list.txt")).selection()


# Bad data -------------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def instances(change):
    return "coco", "annotations/instances_train2017.json", lambda path: rewrite(path, change), True


def first_rle(document) -> dict:
    return next(
        row for row in document["annotations"] if isinstance(row["segmentation"], dict) and row["image_id"] == 2
    )


def first_polygon(document) -> dict:
    return next(
        row for row in document["annotations"] if isinstance(row["segmentation"], list) and row["image_id"] == 2
    )


def replaced(old: str, new: str):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def billion(path: Path) -> None:
    path.write_text(
        '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>' + path.read_text().replace("<name>", "<name>&c;", 1)
    )


def large_rle(document) -> None:
    first_rle(document)["segmentation"] = {"size": [10**9, 10**9], "counts": [10**18]}


def tiny(path: Path) -> None:
    save(path, np.zeros((1, 1, 3), np.uint8))


def wide(path: Path) -> None:
    save(path, np.zeros((16, 30000, 3), np.uint8))


def as_webp(path: Path) -> None:
    Image.open(path.with_suffix(".png")).save(path)
    path.with_suffix(".png").unlink()


def turned(orientation: int) -> Image.Exif:
    """EXIF data of a camera that was held otherwise."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


BAD = {
    # what: (layout, file, damage, whether one item alone is bad)
    "a missing image": ("voc", "JPEGImages/2007_000001.jpg", Path.unlink, True),
    "a missing mask": ("voc", "SegmentationClass/2007_000001.png", Path.unlink, True),
    "a missing depth map": ("nyu", "sync/living_room_0001b/sync_depth_00001.png", Path.unlink, True),
    "a mask of another size": (
        "voc-augmented",
        "SegmentationClassAug/2007_000001.png",
        lambda p: save(p, np.zeros((70, 96), np.uint8)),
        True,
    ),
    "a mask with three channels": (
        "folder",
        "masks/scene 1.png",
        lambda p: save(p, np.zeros((80, 96, 3), np.uint8)),
        True,
    ),
    "an unknown class in a mask": (
        "folder",
        "masks/scene 1.png",
        lambda p: save(p, np.full((80, 96), 77, np.uint8)),
        True,
    ),
    "an unknown class in an instance map": (
        "cityscapes",
        "gtFine/train/aachen/aachen_000001_000019_gtFine_instanceIds.png",
        lambda p: save(p, np.full((48, 96), 50001, np.uint16)),
        True,
    ),
    "a depth map of another size": (
        "kitti",
        "gt_depth/drive_0001/0000000001.png",
        lambda p: save(p, np.zeros((9, 9), np.uint16)),
        True,
    ),
    "an image of one pixel": ("yolo-seg", "images/train/000001.jpg", tiny, True),
    "an image of 30,000 pixels": ("deepfashion-mm", "images/MEN-Denim-id_00000001-01_1_front.jpg", wide, True),
    "half an image": ("lvis", "train2017/000000000002.jpg", lambda p: p.write_bytes(p.read_bytes()[:-900]), True),
    "an image that is text": (
        "vkitti2",
        "Image/Scene02/15-deg-left/frames/rgb/Camera_0/rgb_00000.jpg",
        lambda p: p.write_text("hello"),
        True,
    ),
    "an image of another size than its JSON": (
        "coco",
        "train2017/000000000002.jpg",
        lambda p: save(p, np.zeros((20, 20, 3), np.uint8)),
        True,
    ),
    "an RLE whose runs do not sum": instances(lambda d: first_rle(d)["segmentation"].update(counts=[5, 6, 7])),
    "an RLE string cut short": instances(
        lambda d: first_rle(d)["segmentation"].update(counts=first_rle(d)["segmentation"]["counts"][:-3])
    ),
    "an RLE of another size": instances(lambda d: first_rle(d)["segmentation"].update(size=[5, 5])),
    "an RLE as large as a country": instances(large_rle),
    "a polygon of two corners": instances(lambda d: first_polygon(d).update(segmentation=[[1, 2, 3, 4]])),
    "a polygon far away": instances(lambda d: first_polygon(d).update(segmentation=[[1e9, 2, 3, 4, 5, 6]])),
    "a polygon of words": instances(lambda d: first_polygon(d).update(segmentation=[["a", "b", "c", "d", "e", "f"]])),
    "neither a segmentation nor a box": instances(lambda d: first_polygon(d).update(segmentation=[], bbox=[])),
    "an unknown category": instances(lambda d: first_polygon(d).update(category_id=99)),
    "a file name that leads out": instances(lambda d: d["images"][1].update(file_name="../../secret.jpg")),
    "too few joints": (
        "coco",
        "annotations/person_keypoints_train2017.json",
        lambda p: rewrite(p, lambda d: d["annotations"][1].update(keypoints=[1, 2, 2])),
        True,
    ),
    "an annotation of no image": (*instances(lambda d: d["annotations"][0].update(image_id=4711))[:3], False),
    "an annotation id that is there twice": (
        *instances(lambda d: d["annotations"][1].update(id=d["annotations"][0]["id"]))[:3],
        False,
    ),
    "a crowd that is told in words": (*instances(lambda d: first_polygon(d).update(iscrowd="0"))[:3], False),
    "no list of annotations": (*instances(lambda d: d.pop("annotations"))[:3], False),
    "an image that is there twice": (*instances(lambda d: d["images"].append(d["images"][0]))[:3], False),
    "broken JSON": ("coco", "annotations/instances_train2017.json", lambda p: p.write_text(p.read_text()[:-40]), False),
    "JSON with NaN": (
        "coco",
        "annotations/instances_train2017.json",
        replaced('"iscrowd": 0', '"iscrowd": NaN'),
        False,
    ),
    "JSON that is a list": ("lvis", "lvis_v1_train.json", lambda p: p.write_text("[1, 2]"), False),
    "an empty JSON file": ("coco", "annotations/instances_train2017.json", lambda p: p.write_text(""), False),
    "no annotation file": ("lvis", "lvis_v1_train.json", Path.unlink, False),
    "a list that is no text": ("kitti", "kitti_eigen_train.txt", lambda p: p.write_bytes(b"\xff\xfe\xfa\n"), False),
    "a list without depth": ("nyu", "train_list.txt", lambda p: p.write_text("/a/b.jpg\n"), False),
    "a list that leads out": (
        "kitti",
        "kitti_eigen_train.txt",
        lambda p: p.write_text("../../x.png drive_0001/0000000001.png 1\n"),
        False,
    ),
    "captions that are missing": ("deepfashion-mm", "captions.json", lambda p: p.write_text("{}"), False),
    "captions that are no JSON": ("deepfashion-mm", "captions.json", lambda p: p.write_text("{'a'}"), False),
    "YAML with an alias": ("yolo-seg", "data.yaml", lambda p: p.write_text("a: &a [x]\nnames: *a\n"), False),
    "no names": ("yolo-seg", "data.yaml", lambda p: p.write_text("names: 5\n"), False),
    "joints instead of outlines": (
        "yolo-seg",
        "data.yaml",
        lambda p: p.write_text(f"{p.read_text()}\nkpt_shape: [6, 2]\n"),
        False,
    ),
    "a class that has no name": (
        "yolo-seg",
        "labels/train/000001.txt",
        lambda p: p.write_text("70 0 0 1 0 1 1\n"),
        True,
    ),
    "a corner outside": ("yolo-seg", "labels/train/000001.txt", lambda p: p.write_text("0 0 0 1 0 1 1.7\n"), True),
    "a label that is words": ("yolo-seg", "labels/train/000001.txt", lambda p: p.write_text("ball here\n"), True),
    "a photo as WebP": ("folder", "images/scene 1.webp", as_webp, True),
    "two images of one name": (
        "folder",
        "images",
        lambda p: save(p / "scene 1.jpg", np.zeros((80, 96, 3), np.uint8)),
        False,
    ),
    "depth as a picture of 8 bits": (
        "folder",
        "depth/scene 1.png",
        lambda p: save(p, np.full((80, 96), 77, np.uint8)),
        True,
    ),
    "a photo turned upside down": (
        "folder",
        "images/scene 1.png",
        lambda p: Image.open(p).save(p, exif=turned(3)),
        True,
    ),
    "a photo turned upside down, of outlines that may not be": (
        "coco",
        "train2017/000000000002.jpg",
        lambda p: Image.open(p).save(p, exif=turned(3)),
        True,
    ),
    "an id that is there twice": (
        "voc",
        "ImageSets/Segmentation/train.txt",
        lambda p: p.write_text("2007_000000\n2007_000000\n"),
        False,
    ),
    "an id that leads out": (
        "voc",
        "ImageSets/Segmentation/train.txt",
        lambda p: p.write_text("../../2007_000000\n"),
        False,
    ),
    "no row with depth": (
        "nyu",
        "train_list.txt",
        lambda p: p.write_text("/living_room_0001b/rgb_00000.jpg None 518\r\n"),
        False,
    ),
    "no label of any image": ("yolo-seg", "labels/train", lambda p: [path.unlink() for path in p.iterdir()], False),
    "a path that leads out": ("labelme", "scene 1.json", replaced("scene 1.jpg", "../secret.jpg"), True),
    "a label nobody listed": (
        "cvat",
        "annotations.xml",
        replaced('<tag label="ball"', '<box xtl="1" ytl="1" xbr="5" ybr="5" label="secret"'),
        False,
    ),
    "a mask that is no picture": (
        "labelme",
        "scene 1.json",
        lambda p: rewrite(
            p,
            lambda found: found["shapes"].append(
                found["shapes"][0] | {"points": [[0, 0], [9, 9]], "shape_type": "mask", "mask": "////"}
            ),
        ),
        True,
    ),
    "a mask of another picture": (
        "mask",
        "DIS-TR/gt/1#Sports#1#Ball#0123.png",
        lambda p: save(p, np.zeros((9, 9), np.uint8)),
        True,
    ),
    "a face whose parts are not there": ("celebamask-hq", "CelebAMask-HQ-mask-anno/1", shutil.rmtree, False),
    "an empty class list": ("folder", "classes.txt", lambda p: p.write_text("\n"), False),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data_is_named_and_refused_or_skipped(copied, what):
    layout, name, damage, is_alone = BAD[what]
    root, address = copied(layout)
    damage(root / name)
    with pytest.raises(Refused) as stop:
        list(open_data(address, SIZE))
    assert stop.value.exit_code == 2
    cause = stop.value.cause
    assert Path(name).name in cause or "secret" in cause, cause
    assert len(cause) < 700 and "\n" not in cause
    if is_alone:
        source = open_data(address, SIZE, skip_bad=True)
        assert len(list(source)) == COUNT - 1 and len(source.skipped) == 1
        [(skipped, reason)] = source.skipped.items()
        assert reason == cause and (Path(skipped).suffix in (".jpg", ".png", ".webp", ".json") or skipped == "image 2")
        with pytest.raises(Refused):
            source[1]


def changed(pattern: str, change):
    """A damage of every file of the pattern, which is not empty."""

    def damage(root: Path) -> None:
        for path in [*root.glob(pattern)] or pytest.fail(f"no {pattern}"):
            rewrite(path, change) if path.suffix == ".json" else path.write_text(change(path.read_text()))

    return damage


def written(name: str, content: str):
    return lambda root: text(root / name, content)


def moved(old: str, new: str):
    return lambda root: (root / old).rename(root / new)


def first_shape(**facts):
    return changed("*.json", lambda document: document["shapes"][0].update(facts))


def cells(**facts):
    """A damage of the cells of each row."""
    return changed(
        "train/metadata.jsonl",
        lambda text: "\n".join(json.dumps(json.loads(line) | facts) for line in text.splitlines()),
    )


def as_csv(rows: str, columns: str = "file_name,mask_file_name"):
    def damage(root: Path) -> None:
        (root / "train" / "metadata.jsonl").unlink()
        text(root / "train" / "metadata.csv", f"{columns}\n{rows}")

    return damage


INSTANCES, TASK_OF_CVAT = "annotations/instances_train2017.json", "annotations.xml"
WRONG = [  # (layout, damage, what the cause says, the end of the address)
    ("celebamask-hq", moved("CelebA-HQ-img/0.jpg", "CelebA-HQ-img/face.jpg"), "face.jpg: its name is no number"),
    ("celebamask-hq", lambda root: None, "no split 'all'", "[all]"),
    ("celebamask-hq", lambda root: (root / celebamask.MAPPING).unlink(), "no split 'val'", "[val]"),
    ("coco", changed(INSTANCES, lambda d: d["annotations"][0].update(id=2**63)), "annotations, byte .* 64 bits"),
    ("coco", changed(INSTANCES, lambda d: d["categories"][1].update(id=1)), "the category id 1 occurs twice"),
    ("coco", changed(INSTANCES, lambda d: d["images"][0].pop("file_name")), "image 1 has no file_name"),
    (
        "coco",
        changed(INSTANCES, lambda d: first_polygon(d).update(segmentation=[[1.0] * 6, [1.0] * 200_000])),
        "annotation .*: polygons of more than 100000 corners",
    ),
    ("cvat", changed(TASK_OF_CVAT, lambda text: text.replace("<name>ball<", "<name><")), "a label without a name"),
    ("cvat", changed(TASK_OF_CVAT, lambda text: text.replace(' height="80">', ">")), "0.png has no width and height"),
    (
        "cvat",
        changed(TASK_OF_CVAT, lambda text: text.replace('height="80">', 'height="81">')),
        "96 x 80 .* says 96 x 81",
    ),
    (
        "cvat",
        changed(TASK_OF_CVAT, lambda text: text.replace("<tag ", "<blob ").replace("</tag", "</blob")),
        "shape 'blob'",
    ),
    ("folder", lambda root: [shutil.rmtree(root / name) for name in ("masks", "depth")], "neither masks/ nor depth/"),
    ("folder", written("captions.json", '{"scene 0": 7}'), "the caption of scene 0 is not a text"),
    ("hf-imagefolder", written("classes.json", '{"things": "ball"}'), "classes.json: not what convert writes .*things"),
    ("hf-imagefolder", cells(text=7), "row 0: its caption is not a text"),
    (
        "hf-imagefolder",
        lambda root: save(root / "train" / "depth" / "scene 0.png", np.zeros((40, 50), np.uint16)),
        "row 0: depth has 50 x 40 pixels, but its image has 96 x 80",
    ),
    (
        "hf-imagefolder",
        lambda root: save(root / "train" / "depth" / "scene 0.png", np.zeros((80, 96), np.uint8)),
        "row 0: the pixels of depth are L, expected one number of 16 bits each",
    ),
    (
        "hf-imagefolder",
        lambda root: save(root / "train" / "masks" / "scene 0.png", np.zeros((80, 96, 3), np.uint8)),
        "row 0: the pixels of mask are RGB, expected one number each",
    ),
    ("hf-imagefolder", lambda root: shutil.rmtree(root / "train"), "no data set of Hugging Face's kinds"),
    ("hf-imagefolder", as_csv("a,b\n", "file_name,text"), "its columns are image, text, expected image and a map"),
    ("hf-imagefolder", as_csv('a,"b\n'), "not readable as CSV"),
    (
        "hf-imagefolder",
        as_csv("a,b\na,b,c\n"),
        "row 3 has another num",
    ),
    ("hf-parquet", lambda root: (root / "train-0.parquet").mkdir(), "train-0.parquet: not a regular file"),
    (
        "hf-parquet",
        lambda root: parquet.write_table(pa.table({"image": [1]}), root / "data" / "train-00001-of-00002.parquet"),
        "its columns are not those of train-00000-of-00002.parquet",
    ),
    ("vkitti2", lambda root: None, "no scene 'Scene04'", "[Scene01,Scene04]"),
    (
        "vkitti2",
        lambda root: [path.rename(path.with_name("a")) for path in root.rglob("rgb")],
        "no image below a folder",
    ),
    ("labelme", changed("*.json", lambda d: d.pop("imageHeight")), "not a file that labelme wrote .*imageHeight"),
    ("labelme", changed("*.json", lambda d: d.update(shapes=d["shapes"][:1])), "no class in it"),
    ("labelme", first_shape(points=[[1, 2, 3]]), "shape 0: a point that is not x and y"),
    ("labelme", first_shape(shape_type="circle", points=[[9, 9]]), "shape 0: a circle of 1 points, expected 2"),
    ("labelme", first_shape(shape_type="cube", points=[[9, 9]]), "shape 0: the unknown shape_type 'cube'"),
    ("labelme", first_shape(shape_type="mask", points=[[1, 1], [2, 2]], mask="?"), "shape 0: its picture is no base64"),
    ("mask", lambda root: (root / "DIS-TR" / "gt").rename(root / "gt"), "no folder of images beside one of masks"),
    ("mask", written("classes.txt", "ball\ncube\n"), "2 classes, a binary mask tells one"),
    ("voc", written("labelmap.txt", "background:0,0:::\nball:1,2,300::\n"), "'0,0' is no colour, expected three"),
    ("voc", written("labelmap.txt", "background:0,0,0::\nball:1,2,300::\n"), "'1,2,300' is no colour, expected three"),
    ("voc", written("labelmap.txt", "ball:0,0,0::\nball:1,2,3::\n"), "its names are not different ones"),
    (
        "voc",
        written("_classes.csv", "Pixel Value, Class\n1, ball\n"),
        "_classes.csv: no table of pixel values from 0 on",
    ),
    (
        "voc",
        lambda root: save(root / "SegmentationClass" / "2007_000000.png", np.zeros((72, 96), np.uint8)),
        "SegmentationObject/2007_000000.png: object . lies on no class of SegmentationClass",
    ),
    (
        "voc",
        lambda root: save(root / "SegmentationClass" / "2007_000000.png", np.zeros((9, 16, 3), np.uint8)),
        "2007_000000.png: 16 x 9 pixels, but its image has 96 x 72",
    ),
    ("yolo-seg", lambda root: shutil.rmtree(root / "labels"), "labels/train: no such folder, expected the labels"),
]


@pytest.mark.parametrize(("layout", "damage", "said", "end"), [(*row, "")[:4] for row in WRONG])
def test_what_is_wrong_with_data_is_said(copied, layout, damage, said, end):
    root, address = copied(layout)
    damage(root)
    with pytest.raises(Refused, match=said):
        list(open_data(f"{address}{end}", SIZE))


def test_a_scene_is_called_by_its_seed():
    assert open_data("demo:2@900000", SIZE).name(1) == "demo scene 900001"
    assert [item.id for item in open_data("demo:2", SIZE)] == ["0", "1"]


def test_a_device_is_no_data_set_of_coco():
    with pytest.raises(Refused, match="/dev/null: neither a folder nor a JSON file"):
        open_data("coco:/dev/null", SIZE)


def test_either_file_of_coco_alone_is_read_for_what_it_holds(copied):
    root, address = copied("coco")
    persons = open_data(address, SIZE, tasks=("pose",))
    assert persons.areas(0) == {"person": 1} and open_data(address, SIZE).is_centred(0)
    (things, joints) = (root / f"annotations/{kind}_train2017.json" for kind in ("instances", "person_keypoints"))
    things.rename(root / "things.json")
    alone = open_data(address, SIZE, tasks=("instance",))
    assert alone.thing_classes == ("person",) and len(alone[0].masks) and "pose" not in alone.tasks
    joints.unlink()
    (root / "things.json").rename(things)
    with pytest.raises(Refused, match="instances_train2017.json: no category in it has keypoints"):
        open_data(address, SIZE, tasks=("pose",))


def test_areas_without_masks_are_those_of_the_things_in_the_map(made):
    source = open_data(f"folder:{made('folder')}", SIZE)
    sizes = {source.classes[k]: n for k, n in enumerate(np.bincount(source.picture(0).semantic.ravel())) if n}
    assert source.areas(0) == sizes and "table" in sizes
    source.thing_classes = ("table",)
    assert source.areas(0) == {"table": sizes["table"]} and source.map_areas(0) == sizes
    source.thing_classes = ()
    assert source.areas(0) == sizes
    assert open_data(f"nyu:{made('nyu')}", SIZE).map_areas(0) == {}


def test_parquet_files_of_any_name_are_the_split_train(copied, monkeypatch):
    root, address = copied("hf-parquet")
    for number, file in enumerate((root / "data").glob("*.parquet")):
        file.rename(file.with_name(f"part{number}.parquet"))
    assert len(open_data(address, SIZE)) == COUNT
    with pytest.raises(Refused, match="no split 'val'"):
        open_data(f"{address}[val]", SIZE)
    monkeypatch.setattr(tables, "LARGEST_GROUP", 1)
    with pytest.raises(Refused, match="part0.parquet: a row group of more than 1 bytes"):
        open_data(address, SIZE)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"info": 1}', b"\xff", b'{"info": {"features": {"label": 5}}}']
)
def test_a_damaged_description_of_columns_describes_none(content):
    table = SimpleNamespace(schema=SimpleNamespace(metadata={tables.FEATURES: content}))
    assert tables.TableRows.features(table, "label") == (5 if b"label" in content else None)


def test_class_names_may_stand_in_lists_of_features():
    assert [*hf._feature_names([{"names": []}, {"a": [{"names": ["x", "y"]}]}])] == [("x", "y")]


def run_of(**facts):
    """The reader of a run with one sample, without a folder."""
    source = object.__new__(run_reader.RunSamples)
    source.__dict__ |= {"path": "photos", "records": [(0, "00000007", ())], "is_corrected": False, "map": "", **facts}
    return source


@pytest.mark.parametrize("count", [254, 255])
def test_things_of_a_run_have_a_map_where_8_bits_can_tell_them(count):
    names = [f"thing {k}" for k in range(count)]
    run = SimpleNamespace(document={"labels": {"instance": {"classes": names}}}, path=Path("photos"))
    source = run_of(labels={"instance": "instance"}, run=run)
    source._name_classes(())
    assert source.thing_classes == tuple(names) and len(source.classes) == (255 if count == 254 else 0)
    assert ("semantic" in source.tasks) == (count == 254)


@pytest.mark.parametrize("limbs", [[[0, 2]], [[-1, 0]], [[0]]])
def test_classes_and_limbs_of_a_run_are_those_of_its_tables(limbs):
    tables_of = {"instance": {"classes": ["ball"]}, "pose": {"joints": ["a", "b"], "limbs": [[0, 1]]}}
    labels = {name: name for name in tables_of}
    source = run_of(labels=labels, run=SimpleNamespace(document={"labels": tables_of}, path=Path("photos")))
    source._name_classes(())
    assert source.classes == ("background", "ball") and source.thing_classes == ("ball",)
    assert source.tasks == ("semantic", "instance", "open-vocabulary", "pose") and source.limbs == ((0, 1),)
    tables_of["pose"]["limbs"] = limbs
    with pytest.raises(Refused, match=r"photos/run\.json: a limb that joins no two joints"):
        source._name_classes(())


def test_labels_of_a_run_that_do_not_fit_are_refused_by_the_sample(monkeypatch):
    source = run_of(thing_classes=("ball",), labels={"pose": "pose"}, run=SimpleNamespace(document={}, path=Path("r")))
    for class_id, side, said in ((1, 4, "an instance of the unknown category 2"), (0, 5, r"\[5, 5\] pixels on .*4, 4")):
        label = Instances(np.zeros((1, side, side), bool), np.array([class_id]), np.float32([1]), ("ball",))
        with pytest.raises(Refused, match=f"photos: sample 00000007: .*{said}"):
            source._class_fields(label, 0, (4, 4))
    sample = SimpleNamespace(label=lambda name: None, row=SimpleNamespace(labels={"pose": [{"bbox": [1], "area": 1}]}))
    for person in ({"bbox": [1.0], "area": 1.0}, {"area": 1.0}):
        sample.row.labels["pose"] = [person]
        with pytest.raises(Refused, match="photos: sample 00000007: a person without a box"):
            source._persons(sample, 0)
    assert run_of(records=[(0, "00000007", ("a", "b"))]).origins(0) == ("a", "b")
    joints = SimpleNamespace(points=np.float32([[[1, 2, 0.5]]]), visibility=np.array([[2]]))
    people = {"pose": [{"bbox": [0, 0, 1, 2], "area": 0}]}  # of a person whose joints have no area
    found = source._persons(SimpleNamespace(label=lambda name: joints, row=SimpleNamespace(labels=people)), 0)
    assert [value.tolist() for value in found.values()] == [[[[1, 2, 2]]], [[0, 0, 1, 2]], [1]]
    monkeypatch.setattr(run_reader, "origins", lambda document, row: [7])
    with pytest.raises(Refused, match="r/.*ledger.* the row of sample 00000003 is damaged"):
        source._origins(SimpleNamespace(request=SimpleNamespace(id="00000003")))


def outlined(kind: str, root: Path, document=None, shape: str = "polygon", **figure) -> None:
    """A data set of one picture with one outline or none, as a program writes it."""
    if kind == "label-studio":
        task = {"data": {"image": "a.png"}, "annotations": [{"result": []}]}
        text(root / "project.json", json.dumps(document or [task]))
        return
    save(root / "one" / "img" / "a.png", np.zeros((20, 40, 3), np.uint8))
    document = {"size": {"height": 20, "width": 40}, "objects": [{"classTitle": "cat"} | figure], "tags": []}
    text(root / "one" / "ann" / "a.png.json", json.dumps(document))
    text(root / "meta.json", json.dumps({"classes": [{"title": "cat", "shape": shape, "color": "#fff"}], "tags": []}))


@pytest.mark.parametrize(
    ("kind", "facts", "said"),
    [
        ("label-studio", {"document": {"data": 1}}, "project.json: no list of tasks as Label Studio writes it"),
        ("label-studio", {"document": [{"id": 1}]}, "project.json: no list of tasks"),
        ("label-studio", {}, "project.json: no outline with a label in it"),
        ("supervisely", {"geometryType": "cube"}, "shape 0: the unknown geometryType 'cube'"),
        ("supervisely", {"shape": "point"}, "meta.json: no class with an area in it"),
        (
            "supervisely",
            {"geometryType": "bitmap", "bitmap": {"data": "AAAA", "origin": [0, 0]}},
            "shape 0: its picture is no base64",
        ),
    ],
)
def test_what_is_wrong_with_files_of_labelling_programs_is_said(tmp_path, kind, facts, said):
    outlined(kind, tmp_path, **facts)
    with pytest.raises(Refused, match=said):
        open_data(f"{kind}:{tmp_path}", 20)[0]
    if "shape 0" in said:
        source = open_data(f"{kind}:{tmp_path}", 20, skip_bad=True)
        with pytest.raises(Refused, match="none of 1 images can be read"):
            list(source)
        assert [*source.skipped] == [str(tmp_path / "one" / "ann" / "a.png.json")]


def test_a_folder_of_no_or_of_several_projects_is_refused(tmp_path):
    outlined("label-studio", tmp_path)
    text(tmp_path / "other.json", "[]")
    with pytest.raises(Refused, match="2 JSON files, of which one may be meant"):
        open_data(f"label-studio:{tmp_path}", 20)
    text(tmp_path / "meta.json", "{}")
    with pytest.raises(Refused, match="no data set in it, expected folders with img/ and ann/"):
        open_data(f"supervisely:{tmp_path}", 20)


def test_a_link_that_leads_nowhere_is_called_one(copied):
    root, address = copied("folder")
    image = next((root / "images").rglob("*.png"))
    image.unlink()
    image.symlink_to("gone.png")
    with pytest.raises(Refused, match=r"No such file or directory \(it is a symbolic link that leads nowhere\)"):
        list(open_data(address, SIZE))


def test_skipping_is_no_remedy_for_what_the_whole_data_set_rests_on(copied):
    root, address = copied("folder")
    (root / "classes.txt").write_text("\n")
    with pytest.raises(Refused, match="no line in it") as stop:
        open_data(address, SIZE, skip_bad=True)
    assert "--skip-bad" not in stop.value.remedy


def test_a_photo_is_turned_the_way_its_labels_lie(copied):
    for layout, name, labels_are_turned in (
        ("folder", "images/scene 0.png", True),
        ("hf-imagefolder", "train/images/scene 0.png", True),
        ("coco", "train2017/000000000001.jpg", True),
        ("coco", "", False),
        ("voc", "JPEGImages/2007_000000.jpg", True),
    ):
        root, address = copied(layout)
        before = open_data(address, SIZE, tasks=["semantic"])[0]
        path = root / (name or "train2017/000000000001.jpg")
        image = Image.open(path)
        stored = (
            image.transpose(Image.Transpose.ROTATE_90) if labels_are_turned else image.copy()
        )  # 6: to be turned clockwise
        stored.save(path, exif=turned(6), **({} if path.suffix == ".png" else {"quality": 95}))
        after = open_data(address, SIZE, tasks=["semantic"])[0]
        assert np.abs(after.image.astype(int) - before.image).mean() < 4 and (after.semantic == before.semantic).all()
        shutil.rmtree(root)
    for layout, name in (
        ("yolo-seg", "images/train/000000.jpg"),
        ("labelme", "scene 0.jpg"),
        ("cvat", "images/day/0.png"),
    ):
        root, address = copied(layout)
        before = open_data(address, SIZE)[0]
        path = root / name
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, exif=turned(3), quality=95)
        assert np.abs(open_data(address, SIZE)[0].image.astype(int) - before.image).mean() < 4


def test_a_photo_with_depths_alone_is_turned_the_way_these_lie(copied):
    root, address = copied("folder")
    shutil.rmtree(root / "masks")
    before, path = open_data(address, SIZE)[0].image, root / "images/scene 0.png"
    image = Image.open(path)
    for orientation in (6, 0, 9):  # 0 and 9, which cameras write as well, turn nothing
        image.copy().save(path, exif=turned(orientation))
        assert (open_data(address, SIZE)[0].image == before).all()
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=turned(6))
    assert (open_data(address, SIZE)[0].image == before).all()


@pytest.mark.parametrize("layout", ["labelme", "cvat"])
@pytest.mark.parametrize("orientation", [1, 3, 4, 6, 8])  # 8: labels of a version that did not turn it
def test_a_photo_is_read_as_the_program_showed_it_that_drew_the_labels(copied, layout, orientation):
    root, address = copied(layout)
    source = open_data(address, SIZE)
    path, before = Path(source.name(0).replace(".json", ".jpg")), source[0].image
    shown = Image.open(path)
    back = {3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 6: Image.Transpose.ROTATE_90}
    stored = shown.transpose(back[orientation]) if orientation in back else shown.copy()
    stored.save(path, exif=turned(orientation), quality=95)
    assert np.abs(open_data(address, SIZE)[0].image.astype(int) - before).mean() < 4


@pytest.mark.parametrize("is_of_cvat", [True, False])
def test_photos_upside_down_are_read_as_shown_in_coco_of_cvat_alone(copied, is_of_cvat):
    root, address = copied("coco")
    before, path = open_data(address, SIZE, tasks=["instance"])[0].image, root / "train2017/000000000001.jpg"
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, exif=turned(3), quality=95)
    if is_of_cvat:
        empty = {"flickr_url": "", "coco_url": "", "date_captured": 0}
        rewrite(root / "annotations/instances_train2017.json", lambda d: [row.update(empty) for row in d["images"]])
        assert np.abs(open_data(address, SIZE, tasks=["instance"])[0].image.astype(int) - before).mean() < 4
    else:
        with pytest.raises(Refused, match="cannot be told from its size"):
            open_data(address, SIZE, tasks=["instance"])[0]


@pytest.mark.parametrize("place", ["-0.01", "1.01"])
def test_a_corner_of_yolo_may_lie_a_hundredth_outside_of_the_image(copied, place):
    root, address = copied("yolo-seg")
    (root / "labels/train/000000.txt").write_text(f"0 0 0 1 0 {place} 1 0 {place}\n")
    assert len(open_data(address, SIZE)[0].masks) == 1


def test_a_circle_is_a_polygon_of_64_corners_and_maps_have_254_things():
    area = shapes.ellipse((50, 50), (45, 45), (100, 100))().sum()
    assert area == pytest.approx(64 / 2 * math.sin(math.tau / 64) * 45**2, abs=8)  # of 32 corners it is smaller by 31
    columns = np.flatnonzero(shapes.ellipse((1000, 1000), (1000, 1000), (2000, 2000))().any(0))
    assert (columns[0], columns[-1]) == (0, 1999)  # of 63 corners the leftmost lies 1.2 pixels inside
    for count, classes in ((254, 255), (255, 0)):
        source = SimpleNamespace()
        shapes.OutlineSource.set_things(source, map(str, range(count)))
        assert len(source.classes) == classes and ("semantic" in source.tasks) == (classes > 0)


def test_corners_of_yolo_are_shares_of_width_and_height():
    reader, things = SimpleNamespace(names=("ball",), thing_classes=("ball",)), shapes.Things()
    yolo.Yolo._add_line(reader, things, "0 0 0.5 0.25 0.5 0.25 1 0 1", (10, 20, 3))
    assert np.argwhere(things.masks[0]()).tolist() == [[y, x] for y in range(5, 10) for x in range(5)]
    with pytest.raises(ValueError, match="a corner outside the image"):
        yolo.Yolo._add_line(reader, things, "0 0 0.5 1.02 0.5 0.25 1", (10, 20, 3))


@pytest.mark.parametrize("count", [255, 256])
def test_a_mask_tells_as_many_classes_as_it_has_numbers_but_the_ignored_one(tmp_path, count):
    save(tmp_path / "images" / "0.png", np.zeros((64, 64, 3), np.uint8))
    save(tmp_path / "masks" / "0.png", np.full((64, 64), 254, np.uint8))
    (tmp_path / "classes.txt").write_text("".join(f"kind {k}\n" for k in range(count)))
    if count == 255:
        assert (open_data(f"folder:{tmp_path}", SIZE)[0].semantic == 254).all()
        return
    with pytest.raises(Refused, match="256 classes, an 8-bit mask can tell 255"):
        open_data(f"folder:{tmp_path}", SIZE)


def test_a_label_file_of_empty_lines_shows_nothing(copied):
    root, address = copied("yolo-seg")
    (root / "labels/train/000000.txt").write_text("\n\n")
    source = open_data(address, SIZE)
    assert not len(source[0].masks) and source[0].caption == "a photo" and len(source[1].masks)


def test_what_label_studio_exports_as_yolo_is_read(copied, made):
    root, address = copied("yolo-seg")
    before = open_data(f"yolo-seg:{made('yolo-seg')}", SIZE)
    text(root / "classes.txt", "\n".join(before.names))
    (root / "data.yaml").unlink()
    for part in ("images", "labels"):
        for file in [*(root / part / "train").iterdir()]:
            file.rename(root / part / file.name)
        (root / part / "train").rmdir()
    assert same_items(open_data(address, SIZE), before)
    with pytest.raises(Refused, match="found neither .*images/val"):
        open_data(f"{address}[val]", SIZE)


@pytest.mark.parametrize("places", [("valid/images", "valid/labels"), ("images/valid", "labels/valid")])
def test_the_split_val_of_yolo_may_be_called_valid(copied, places):
    root, address = copied("yolo-seg")
    before = [item.masks for item in open_data(address, SIZE)]
    for part, place in zip(("images", "labels"), places, strict=True):
        shutil.copytree(root / part / "train", root / place)
        shutil.rmtree(root / part / "train")
    after = [item.masks for item in open_data(f"{address}[val]", SIZE)]
    assert all((one == other).all() for one, other in zip(after, before, strict=True))
    with pytest.raises(Refused, match="found neither .*images/train"):
        open_data(address, SIZE)


def test_classes_that_are_written_with_a_point_are_read_where_they_are_whole(copied):
    root, address = copied("yolo-seg")
    path, before = root / "labels/train/000000.txt", open_data(address, SIZE)[0]
    said = [line.split() for line in path.read_text().splitlines()]
    path.write_text("".join(f"{kind}.0 {' '.join(places)}\n" for kind, *places in said))
    after = open_data(address, SIZE)[0]
    assert (after.masks == before.masks).all() and (after.mask_classes == before.mask_classes).all()
    for kind, word in (("0.5", "not a class"), ("nan", "not a class"), ("inf", "not a class"), ("-1", "class -1")):
        path.write_text(f"{kind} {' '.join(said[0][1:])}\n")
        with pytest.raises(Refused, match=word):
            open_data(address, SIZE)[0]


def test_names_of_classes_may_be_numbers_and_their_numbers_texts(copied):
    root, address = copied("yolo-seg")
    count = len(open_data(address, SIZE).thing_classes)
    for names in ([*range(count)], {str(k): str(k) for k in range(count)}, {k: k for k in reversed(range(count))}):
        (root / "data.yaml").write_text(json.dumps({"names": names}))
        assert open_data(address, SIZE).thing_classes == tuple(map(str, range(count)))
    for names in ([1, "1", *range(2, count)], {"a": "b"}, [True, *range(1, count)]):
        (root / "data.yaml").write_text(json.dumps({"names": names}))
        with pytest.raises(Refused, match="names is no list of different class names"):
            open_data(address, SIZE)


def in_train(root: Path, *left: str) -> None:
    """Moves a data set into its folder train, all but the files of these names."""
    entries = [entry for entry in root.iterdir() if entry.name not in left]
    (root / "train").mkdir()
    for entry in entries:
        entry.rename(root / "train" / entry.name)


def test_a_thing_of_many_shapes_takes_the_memory_of_few():
    source = SimpleNamespace(thing_classes=("mug",))
    masks = [shapes.box((k, k, k + 9, k + 9), (1000, 1000)) for k in range(60)]
    outlines = [("mug", "1", lambda mask=mask: mask) for mask in masks]
    (union,) = shapes.OutlineSource.draw(source, "a.json", "", outlines).masks
    tracemalloc.start()
    try:
        made, (_, peak) = union(), tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (made == np.any([mask() for mask in masks], axis=0)).all() and peak < 10 * made.nbytes


def test_classes_of_labelme_have_the_order_of_a_list_beside_the_splits(copied):
    root, address = copied("labelme")
    names = open_data(address, SIZE).thing_classes[::-1]
    text(root / "labels.txt", "\n".join(names))
    in_train(root, "labels.txt")
    assert open_data(f"{address}[train]", SIZE).thing_classes == names


def test_shapes_of_group_0_of_labelme_are_one_thing(copied):
    root, address = copied("labelme")
    path = root / "scene 0.json"
    document = json.loads(path.read_text())
    boxes = [[[0, 0], [9, 9]], [[20, 0], [29, 9]]]
    for group, count in ((0, 1), (None, 2)):
        document["shapes"] = [
            {"label": "ball", "points": box, "shape_type": "rectangle", "group_id": group} for box in boxes
        ]
        path.write_text(json.dumps(document))
        assert len(open_data(address, SIDE)[0].masks) == count


def test_the_farthest_depth_of_a_folder_is_that_of_its_split_before_that_of_all(copied):
    root, address = copied("folder")
    text(root / "max_depth.txt", "20")
    in_train(root, "max_depth.txt")
    assert open_data(address, SIZE).max_depth == 20
    text(root / "train" / "max_depth.txt", "5")
    assert open_data(address, SIZE).max_depth == 5


def test_several_scenes_of_virtual_kitti_are_read_together(copied):
    _, address = copied("vkitti2")
    names = [item.id[:7] for item in open_data(f"{address}[Scene03,Scene01]", SIZE)]
    assert names == ["Scene01", "Scene03"]


@pytest.mark.parametrize("folder", ["official_splits/test", "official_splits", "."])
def test_pictures_of_the_test_split_of_nyu_lie_where_benchmarks_put_them(copied, folder):
    root, address = copied("nyu")
    (root / "train_list.txt").rename(root / "test_list.txt")
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "sync" / "living_room_0001b").rename(root / folder / "living_room_0001b")
    (root / "sync").rmdir()
    for split in ("test", "val"):
        assert [item.caption for item in open_data(f"{address}[{split}]", SIZE)] == ["a photo of a living room"] * COUNT


def test_a_label_of_points_alone_is_no_class_of_labelme(copied):
    root, address = copied("labelme")
    classes, masks = open_data(address, SIZE).thing_classes, len(open_data(address, SIZE)[0].masks)
    for path in root.glob("*.json"):
        document = json.loads(path.read_text())
        document["shapes"].append({"label": "nose", "points": [[1, 1]], "shape_type": "point"})
        path.write_text(json.dumps(document))
    assert open_data(address, SIZE).thing_classes == classes
    (root / "classes.txt").write_text("\n".join(classes))
    assert len(open_data(address, SIZE)[0].masks) == masks


def test_a_caption_that_was_cut_within_a_character_can_be_read(copied):
    root, address = copied("folder")
    path = root / "captions.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({name: text + " \U0001f333"[:2] + "\ud83c" for name, text in said.items()}))
    source = open_data(address, SIZE)
    for item in (source[0], whole_item(source, 0)):
        assert item.caption == f"{next(iter(said.values()))} \U0001f333?"


def test_captions_go_by_file_name_or_name_and_those_of_other_images_are_refused(copied):
    root, spec = copied("folder")
    path = root / "captions.json"
    path.write_text(json.dumps({"scene 0.png": "a quiet room", "scene 1": "a garden"}))
    source = open_data(spec, 64)
    assert [item.caption for item in source][:2] == ["a quiet room", "a garden"]
    assert source.layout == f"captions.json names 2 of {len(source)} images"
    path.write_text(json.dumps(dict.fromkeys(source.ids, "a room")))
    assert open_data(spec, 64).layout == ""
    path.write_text(json.dumps({"scene 0.jpg": "a quiet room"}))
    with pytest.raises(Refused, match="names none of the images") as stop:
        open_data(spec, 64)
    assert stop.value.remedy == "Name them by their paths there, such as 'scene 0'."
    for content in ('{"scene 0": "a room",}', '["a room"]', ""):  # written by hand: there is nothing to get again
        path.write_text(content)
        with pytest.raises(Refused, match="captions.json") as stop:
            open_data(spec, 64)
        assert stop.value.remedy == 'Write {"a.jpg": "a dog on a sofa"}.'


def test_a_folder_without_names_of_classes_is_told_how_to_give_them(copied):
    root, address = copied("folder")
    (root / "classes.txt").unlink()
    with pytest.raises(Refused, match="found neither .*/folder/classes.txt nor .*/classes.txt") as stop:
        open_data(address, SIZE)
    assert stop.value.remedy.startswith("Write one class name per line there")


@pytest.mark.parametrize(
    ("kind", "file", "first"),
    [
        ("folder", "classes.txt", "Background"),
        ("folder", "classes.txt", "_background_"),
        ("voc", "labelmap.txt", "BACKGROUND:0,0,0::"),
    ],
)
def test_a_background_is_no_thing_however_it_is_written(copied, kind, file, first):
    root, address = copied(kind)
    (root / file).write_text("\n".join([first, *(f"c{k}" for k in range(1, 30))]))
    source = open_data(address, SIZE)
    assert source.classes[0] == "background" and source.thing_classes == source.classes[1:]


def test_labels_of_sub_folders_and_linked_folders_are_found(copied):
    root, address = copied("folder")
    before = [item.semantic for item in open_data(address, SIZE)]
    for kind in ("images", "masks", "depth"):
        for k in range(COUNT):
            (root / kind / f"day {k}").mkdir()
            (root / kind / f"scene {k}.png").rename(root / kind / f"day {k}" / "Straße.1.png")
    (root / "captions.json").unlink()
    (root / "images" / "day 0").rename(root / "elsewhere")
    (root / "images" / "day 0").symlink_to(root / "elsewhere")
    (root / "images" / "day 1" / "up").symlink_to(root / "images")
    items = list(open_data(address, SIZE))
    assert [item.id for item in items] == [f"day {k}/Straße.1" for k in range(COUNT)]
    assert all((item.semantic == labels).all() for item, labels in zip(items, before))


@pytest.mark.parametrize("name", ["folder", "deepfashion-mm"])
def test_a_split_that_is_not_there_is_not_the_whole(made, name):
    with pytest.raises(Refused, match="no split 'val'"):
        open_data(f"{name}:{made(name)}[val]", SIZE)


@pytest.mark.parametrize("kind", ["yolo-seg", "voc", "labelme", "folder", "hf", "run"])
def test_a_file_in_place_of_a_folder_is_called_one(tmp_path, kind):
    (tmp_path / "data.yaml").touch()
    with pytest.raises(
        Refused, match=r"data\.yaml is a file, expected a folder\nGive the folder of the data set itself"
    ):
        open_data(f"{kind}:{tmp_path}/data.yaml", SIZE)


def test_a_folder_that_is_not_there_lacks_more_than_a_scene(tmp_path):
    with pytest.raises(Refused, match="nowhere is not there"):
        open_data(f"vkitti2:{tmp_path}/nowhere[Scene01]", SIZE)


def test_pose_data_without_persons_is_refused_and_uncounted_joints_are_counted(copied):
    root, address = copied("coco")
    path = root / "annotations" / "person_keypoints_train2017.json"
    count = len(open_data(address, SIZE, tasks=["pose"]))
    rewrite(path, lambda d: [row.pop("num_keypoints") for row in d["annotations"]])
    assert len(open_data(address, SIZE, tasks=["pose"])) == count
    for change in (
        lambda d: [row.update(num_keypoints=0) for row in d["annotations"]],
        lambda d: d["annotations"].clear(),
    ):
        rewrite(path, change)
        with pytest.raises(Refused, match="no image has ground truth for pose"):
            open_data(address, SIZE, tasks=["pose"])
        item = open_data(address, SIZE)[0]
        assert len(item.masks) and not len(item.keypoints)


def test_one_file_of_coco_may_hold_outlines_and_joints(copied):
    root, address = copied("coco")
    apart = [item.keypoints.tolist() for item in open_data(address, SIZE)]
    path = root / "annotations/person_keypoints_train2017.json"
    persons = json.loads(path.read_text())
    path.unlink()

    def join(document):
        document["categories"].append(persons["categories"][0] | {"id": 100, "name": "walker"})
        document["annotations"] += [row | {"category_id": 100} for row in persons["annotations"]]

    rewrite(root / "annotations/instances_train2017.json", join)
    for tasks in ((), ("instance", "pose")):
        source = open_data(address, SIZE, tasks=tasks)
        assert [item.keypoints.tolist() for item in source] == apart and "walker" in source.thing_classes
    assert open_data(address, SIZE, tasks=["instance"])[0].keypoints is None
    assert len(open_data(address, SIZE, tasks=["pose"])) == sum(map(len, apart)) > 0


MUGS = {"background": (0, 0, 0), "mug": (250, 50, 83), "leaf": (51, 221, 255)}  # colours that CVAT gives


@pytest.fixture
def mugs(tmp_path):
    """Two pictures of classes that are not VOC's; a row is ignored, and a mug has two parts."""
    labels = np.zeros((40, 48), np.uint8)
    labels[4:20, 4:20], labels[4:20, 30:40], labels[24:36, 6:40], labels[0] = 1, 1, 2, 255
    objects = np.where(labels == 1, 1, np.where(labels == 2, 2, np.where(labels == 255, 255, 0))).astype(np.uint8)
    image = np.repeat((labels % 7 * 30)[..., None], 3, 2)

    def check(source: LabelledSource, *, has_ignored: bool = True) -> None:
        assert source.classes == ("background", "mug", "leaf") and source.thing_classes == ("mug", "leaf")
        expected = labels if has_ignored else np.where(labels == 255, 0, labels)
        assert [item.id for item in source] == ["a", "b"]
        for record in range(2):
            picture = source.picture(record)
            assert (picture.semantic == expected).all() and picture.caption == ("mug", "leaf")

    return SimpleNamespace(root=tmp_path, labels=labels, objects=objects, image=image, check=check)


def coloured(numbers: np.ndarray, colours: list[tuple[int, int, int]]) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)], table[255] = colours, (224, 224, 192)
    return table[numbers]


def test_the_segmentation_masks_of_cvat_are_read_by_their_colours(mugs):
    for name in "ab":
        save(mugs.root / f"JPEGImages/{name}.png", mugs.image)
        save(mugs.root / f"SegmentationClass/{name}.png", coloured(mugs.labels, [*MUGS.values()]))
        save(
            mugs.root / f"SegmentationObject/{name}.png", coloured(mugs.objects, [(0, 0, 0), (128, 0, 0), (0, 128, 0)])
        )
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in sorted(MUGS.items())]
    text(mugs.root / "labelmap.txt", "# label:color_rgb:parts:actions\n" + "\n".join([lines[0], lines[2], lines[1]]))
    text(mugs.root / "ImageSets/Segmentation/default.txt", "a\nb\n")
    source = open_data(f"voc:{mugs.root}", SIZE, tasks=["instance"])
    mugs.check(source)
    picture = source.picture(0)
    assert list(picture.mask_classes) == [1, 0]  # by their colours, of which the leaf's comes first
    assert [int(make().sum()) for make in picture.masks] == [12 * 34, 16 * 26]
    text(mugs.root / "ImageSets/Segmentation/default.txt", "a\nnothing\nb\n")  # nobody drew a shape on the second
    save(mugs.root / "JPEGImages/nothing.png", mugs.image)
    mugs.check(open_data(f"voc:{mugs.root}", SIZE))
    text(mugs.root / "labelmap.txt", "\n".join(lines[::-1]))  # the background's last
    mugs.check(found := open_data(f"voc:{mugs.root}", SIZE))
    assert found.classes == ("background", "mug", "leaf")
    (mugs.root / "labelmap.txt").write_text("background:0,0,0::\nmug:250,50,83::\n")
    with pytest.raises(Refused, match="the colour 51,221,255 is of no class in labelmap.txt"):
        open_data(f"voc:{mugs.root}", SIZE)[0]
    (mugs.root / "labelmap.txt").unlink()
    with pytest.raises(Refused, match="is of no class of VOC, and no labelmap.txt beside JPEGImages names others"):
        open_data(f"voc:{mugs.root}", SIZE)[0]


def test_classes_of_a_label_map_without_colours_have_those_of_voc(mugs):
    """As Datumaro writes them where nobody chose colours."""
    for name in "ab":
        save(mugs.root / f"JPEGImages/{name}.jpg", mugs.image)
        colours = coloured(mugs.labels, [(0, 0, 0), (128, 0, 0), (0, 128, 0)])
        save(mugs.root / f"SegmentationClass/{name}.png", colours)
    text(mugs.root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:::\nmug:::\nleaf:::\n")
    mugs.check(open_data(f"voc:{mugs.root}", SIZE))


def test_a_label_map_of_some_of_vocs_classes_keeps_their_numbers(mugs):
    for name in "ab":
        save(mugs.root / f"JPEGImages/{name}.jpg", mugs.image)
        save(
            mugs.root / f"SegmentationClass/{name}.png",
            np.array([0, 8, 1], np.uint8)[mugs.labels % 255],
        )
    text(mugs.root / "labelmap.txt", "background:0,0,0::\naeroplane:128,0,0::\ncat:64,0,0::\n")
    labels = open_data(f"voc:{mugs.root}", SIZE).picture(0).semantic
    assert (labels[mugs.labels == 1] == 2).all() and (labels[mugs.labels == 2] == 1).all()


def test_things_of_voc_are_its_twenty_classes():
    assert voc.Voc.classes == ("background", *voc.Voc.thing_classes) and len(voc.Voc.thing_classes) == 20
    assert voc.Voc.thing_classes[::19] == ("aeroplane", "tvmonitor")


def test_numbers_of_vocs_palette_are_those_of_colours_in_any_order():
    black, maroon, green = voc.voc_palette()[0], voc.voc_palette()[1], voc.voc_palette()[2]
    numbers = voc.numbers_of([black, green, maroon])
    assert numbers[[0, 1, 2, 3, 255]].tolist() == [0, 2, 1, -1, 255]
    assert voc.numbers_of([black, green, None]) is None and voc.numbers_of([black, (1, 2, 3)]) is None


def test_what_labelme_writes_as_voc_is_read_without_lists(mugs):
    for name in "ab":
        save(mugs.root / f"JPEGImages/{name}.jpg", mugs.image)
        save(mugs.root / f"SegmentationClass/{name}.png", mugs.labels)
    text(mugs.root / "class_names.txt", "_background_\nmug\nleaf\n")
    mugs.check(open_data(f"voc:{mugs.root}", SIZE))


def test_the_semantic_masks_of_roboflow_are_read(mugs):
    for name in "ab":
        save(mugs.root / f"valid/{name}.jpg", mugs.image)
        save(mugs.root / f"valid/{name}_mask.png", np.where(mugs.labels == 255, 0, mugs.labels).astype(np.uint8))
    text(mugs.root / "valid/_classes.csv", "Pixel Value, Class\n0, background\n1, mug\n2, leaf\n")
    mugs.check(open_data(f"voc:{mugs.root}[valid]", SIZE), has_ignored=False)


def test_voc_with_both_sets_of_maps_has_objects_for_the_asking(copied, made):
    root, address = copied("voc")
    shutil.copytree(made("voc-augmented"), root, dirs_exist_ok=True)
    assert open_data(address, SIZE).tasks == ("semantic", "open-vocabulary")
    assert open_data(address, SIZE, tasks=["instance"])[0].masks.any()
    with open(root / "splits" / "train_aug.txt", "a") as lines:
        lines.write("2008_000009\n")  # which has no objects
    assert [len(open_data(address, SIZE, tasks=tasks)) for tasks in ((), ("instance",))] == [COUNT + 1, COUNT]
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClassAug", "png")):
        (root / folder / f"2007_000000.{suffix}").rename(root / folder / f"my cat.v2.{suffix}")
    (root / "splits" / "train_aug.txt").unlink()
    (root / "ImageSets" / "Segmentation" / "train.txt").write_bytes(b"\xef\xbb\xbfmy cat.v2\r\n")
    assert [item.id for item in open_data(address, SIZE)] == ["my cat.v2"]
    (picture,) = root.rglob("my cat.v2.jpg")
    picture.rename(picture.with_suffix(".JPG"))  # as cameras write it
    assert [item.id for item in open_data(address, SIZE)] == ["my cat.v2"]


def test_a_photo_of_24_megapixels_is_read(copied):
    root, address = copied("folder")
    shutil.rmtree(root / "depth")
    save(root / "images" / "scene 0.png", np.zeros((4000, 6000, 3), np.uint8), compress_level=1)
    save(root / "masks" / "scene 0.png", np.zeros((4000, 6000), np.uint8), compress_level=1)
    assert not open_data(address, SIZE, tasks=["semantic"])[0].semantic.any()


def test_an_image_of_a_hundred_million_pixels_is_refused_without_a_word_more(copied, recwarn):
    root, address = copied("folder")
    Image.new("1", (10_000, 10_000)).save(root / "images" / "scene 1.png")
    with pytest.raises(Refused, match="scene 1.png.*10000 x 10000 pixels"):
        list(open_data(address, SIZE))
    assert not [warning for warning in recwarn if "pixels" in str(warning.message)]


def test_a_bad_image_met_while_selecting_is_skipped_or_refused(copied):
    root, address = copied("voc")
    (root / "SegmentationClass" / "2007_000000.png").unlink()
    with pytest.raises(Refused, match="2007_000000"):
        open_data(address, SIZE, selection=Selection(per_class=1))
    source = open_data(address, SIZE, selection=Selection(per_class=1), skip_bad=True)
    assert [item.id for item in source] == ["2007_000001", "2007_000002"] and len(source.skipped) == 1


def test_a_limit_counts_the_images_that_can_be_read(copied):
    root, address = copied("voc")
    path = root / "JPEGImages" / "2007_000000.jpg"
    path.write_bytes(path.read_bytes()[:-900])
    for selection in (Selection(most=1), Selection(per_class=1, most=1)):
        source = open_data(address, SIZE, selection=selection, skip_bad=True)
        assert [item.id for item in source] == ["2007_000001"] and len(source.skipped) == 1, selection
    source = open_data(address, SIZE, selection=Selection(most=1))
    with pytest.raises(Refused, match="2007_000000"):
        source[0]


ROUNDS = 500 if IS_LONG else 20


@pytest.mark.parametrize("name", LAYOUTS)
def test_mutilated_files_are_read_or_refused_and_nothing_else(copied, name):
    root, address = copied(name)
    random = np.random.default_rng(sum(map(ord, name)))
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    small = [path for path in paths if path.suffix in (".json", ".txt", ".yaml", ".xml")]
    refused = 0
    for _ in range(ROUNDS):
        among = small if small and random.random() < 0.7 else paths
        path = among[random.integers(len(among))]
        whole = path.read_bytes()
        path.write_bytes(mutilated(whole, random))
        try:
            list(open_data(address, 32))
        except Refused as stop:
            refused += 1
            assert "\n" not in stop.cause and len(stop.cause) < 800
        path.write_bytes(whole)
    assert refused > 2 and len(list(open_data(address, 32))) == COUNT


def mutilated(data: bytes, random: np.random.Generator) -> bytes:
    """A byte flipped, a stretch taken out, doubled, or replaced by something that means something."""
    words = (
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"[]",
        b"{}",
        b"99999999999999999999",
        b"0",
        b'"',
        b"../..",
        b"\x00",
        b"\xff\xfe",
        b"true",
        b"1.5",
        b"",
        b" ",
    )
    place, kind = int(random.integers(len(data))), random.integers(5)
    end = place + int(random.integers(1, 40))
    if kind == 0:
        return data[:place] + bytes([data[place] ^ (1 << random.integers(8))]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + data[end:]
    if kind == 2:
        return data[:end] + data[place:]
    if kind == 3:
        return data[:place]
    numbers = list(re.finditer(rb"[-\d.]+|\"[^\"]*\"", data[:200_000]))
    if not numbers:
        return data[:place] + words[random.integers(len(words))] + data[end:]
    found = numbers[random.integers(len(numbers))]
    return data[: found.start()] + words[random.integers(len(words))] + data[found.end() :]


@pytest.mark.parametrize(
    "spec",
    [
        "voc:",
        "run:/nowhere",
        "coco:/nowhere/at/all",
        "folder:/dev/null",
        "kitti:",
        "cityscapes:/nowhere",
        "yolo-seg:/nowhere",
        "vkitti2:/nowhere",
    ],
)
def test_places_that_are_no_data_set_are_refused(spec):
    with pytest.raises(Refused):
        open_data(spec, SIZE)


def test_a_folder_that_is_not_there_is_told_as_such(tmp_path):
    with pytest.raises(Refused) as stop:
        open_data(f"folder:{tmp_path}/photos", SIZE)
    assert stop.value.cause == f"--data folder:{tmp_path}/photos: {tmp_path}/photos is not there"
    assert "data set" in stop.value.remedy


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_nobody_may_look_into_is_refused(copied, name):
    root, address = copied(name)
    user = os.geteuid()
    open_data(address, SIZE)  # whatever is imported late is imported now, while it can be read
    root.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)  # root may look anywhere
    except OSError:
        root.chmod(0o755)
        pytest.skip("root may look anywhere, and this namespace knows nobody else")
    try:
        with pytest.raises(Missing, match="Permission denied"):
            open_data(address, SIZE)
    finally:
        os.seteuid(user)
        root.chmod(0o755)


def test_a_damaged_row_is_left_out_where_images_are_named_too(tmp_path):
    pictures = []
    for k in range(3):
        save(tmp_path / f"{k}.png", np.full((20, 40, 3), k, np.uint8))
        pictures.append({"bytes": (tmp_path / f"{k}.png").read_bytes(), "path": f"{k}.png"})
    texts = pa.array([b"a", b"\xff\xfe", b"a"], pa.binary()).view(pa.string())
    numbers = pa.array([[[0] * 40] * 20] * 3, pa.list_(pa.list_(pa.int32())))
    parquet.write_table(pa.table({"image": pictures, "label": numbers, "text": texts}), tmp_path / "train-0.parquet")
    text(tmp_path / "classes.txt", "background\nmug\n")
    for names in ((), ("0.png", "2.png")):
        source = open_data(f"hf:{tmp_path}", SIZE, skip_bad=True, selection=Selection(images=names))
        assert [item.id for item in source] == ["00000000", "00000002"]


def test_a_missing_library_is_said(monkeypatch, tmp_path):
    import sys

    (tmp_path / "train-0.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Missing, match="pyarrow") as stop:
        open_data(f"hf:{tmp_path}", SIZE)
    assert stop.value.exit_code == 3 and "[hf]" in stop.value.remedy


def test_classes_units_and_splits_of_hugging_face_folders_are_read_where_they_stand(copied):
    root, address = copied("hf-imagefolder")
    shutil.copytree(root / "train", root / "val")
    for path in (root / "val" / "depth").iterdir():
        path.write_bytes(with_text(path.read_bytes(), "depth unit", "1/256 metre"))
    with pytest.raises(Refused, match="no split 'test'"):
        open_data(f"{address}[test]", SIZE)
    near, far = (open_data(f"{address}[{split}]", SIZE)[0].depth for split in ("train", "val"))
    assert near.max() < 10 and far[far > 0].min() > 3
    (root / "val").rename(root / "validation")  # as `datasets` calls it
    assert (open_data(f"{address}[val]", SIZE)[0].depth == far).all()
    (root / "validation").rename(root / "val")
    (root / "metadata.csv").write_text("file_name,label_file_name\nval/images/scene 1.png,val/masks/scene 1.png\n")
    for split in ("train", "val"):
        (root / split / "metadata.jsonl").unlink()
    source = open_data(f"{address}[val]", SIZE, selection=Selection(images=("val/images/scene 1.png",)))
    assert source.tasks == ("semantic", "open-vocabulary") and len(source) == 1
    assert (source[0].semantic == open_data(f"folder:{made_of(root)}", SIZE)[1].semantic).all()
    with pytest.raises(Refused, match="no split 'test'"):
        open_data(f"{address}[test]", SIZE)
    (root / "metadata.csv").write_text("file_name,label_file_name\nval/images/scene 1.png,../secret.png\n")
    with pytest.raises(Refused, match="leads out"):
        open_data(f"{address}[val]", SIZE)[0]


def test_the_splits_of_a_hugging_face_folder_may_lie_in_its_folder_data(copied):
    root, address = copied("hf-imagefolder")
    before = [item.semantic for item in open_data(address, SIZE)]
    (root / "data").mkdir()
    (root / "train").rename(root / "data" / "train")
    assert (np.array([item.semantic for item in open_data(address, SIZE)]) == before).all()


def test_an_export_without_depths_names_its_things_among_its_classes(copied):
    root, address = copied("hf-imagefolder")
    path = root / "train" / "metadata.jsonl"
    rows = [{k: v for k, v in json.loads(line).items() if "depth" not in k} for line in path.read_text().splitlines()]
    text(path, "\n".join(map(json.dumps, rows)))
    names = {str(k): name for k, name in enumerate(world.CLASSES)}
    text(root / "classes.json", json.dumps({"id2label": names, "things": ["ball", "cone"]}))
    source = open_data(address, SIZE)
    assert source.tasks == ("semantic", "open-vocabulary") and {*source.thing_classes} == {"ball", "cone"}


def test_names_of_classes_beside_the_pictures_of_a_split_count_before_those_of_all(copied):
    root, address = copied("hf-imagefolder")
    for folder, ending in ((root, "a"), (root / "train", "b")):
        names = {str(k): name + ending * (k > 0) for k, name in enumerate(world.CLASSES)}
        text(folder / "id2label.json", json.dumps(names))
        assert open_data(address, SIZE).classes == tuple(names.values())


def test_the_only_list_of_rows_is_the_split_train(copied):
    root, _ = copied("hf-imagefolder")
    shutil.copy(root / "classes.txt", root / "train")
    assert len(open_data(f"hf:{root}/train", SIZE)) == COUNT
    with pytest.raises(Refused, match="no split 'val'"):
        open_data(f"hf:{root}/train[val]", SIZE)


def test_joints_of_names_that_are_no_unicode_are_refused(copied):
    root, address = copied("coco")
    path = root / "annotations/person_keypoints_train2017.json"
    rewrite(path, lambda found: found["categories"][0]["keypoints"].__setitem__(0, "\ud800"))
    with pytest.raises(Refused, match="the class or joint .* is not valid Unicode"):
        open_data(address, SIZE)


def test_a_cell_of_a_table_keeps_its_lines(copied):
    root, address = copied("hf-imagefolder")
    rows = 'file_name,label_file_name,text\r\n\r\nimages/scene 1.png,masks/scene 1.png,"a cat\n\n and ""a"" dog"\r\n'
    (root / "train" / "metadata.jsonl").unlink()
    (root / "train" / "metadata.csv").write_bytes(rows.encode("utf-8-sig"))
    assert [item.caption for item in open_data(address, SIZE)] == ['a cat\n\n and "a" dog']


def made_of(root: Path) -> Path:
    """The plain folder inside of an image folder."""
    shutil.copy(root / "classes.txt", root / "val" / "classes.txt")
    return root / "val"


@pytest.mark.parametrize("cell", [3, "cat"])
def test_hugging_face_labels_of_whole_pictures_are_no_maps(copied, cell):
    root, address = copied("hf-imagefolder")
    path = root / "train" / "metadata.jsonl"
    before = [item.semantic for item in open_data(address, SIZE)]
    rows = [{**json.loads(line), "label": cell} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, rows)))
    after = [item.semantic for item in open_data(address, SIZE, tasks=("semantic", "depth"))]
    assert all((labels == was).all() for labels, was in zip(after, before, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_captions_that_are_made_of_the_labels_are_known_to_name_all(made, name):
    """By which --by-name auto decides; a binary mask is of a class that no prompt would name."""
    source = open_data(f"{LAYOUTS[name][0]}:{made(name)}", SIZE)
    is_made = isinstance(source.picture(0).caption, tuple) if isinstance(source, PictureSource) else False
    assert source.captions_name_all == (is_made and LAYOUTS[name][0] != "mask")


@pytest.mark.parametrize(
    ("layout", "name"), [("coco", "annotations/instances_train2017.json"), ("lvis", "lvis_v1_train.json")]
)
def test_pictures_of_background_alone_are_data(copied, layout, name):
    """As in every other layout; that a whole data set shows nothing, training says itself."""
    root, address = copied(layout)
    listed = json.loads((root / name).read_text())
    searched = {"neg_category_ids": [row["id"] for row in listed["categories"]]} if layout == "lvis" else {}
    rewrite(root / name, lambda d: d.update(annotations=[], images=[row | searched for row in d["images"]]))
    items = list(open_data(address, SIZE, tasks=("semantic", "instance")))
    assert len(items) == COUNT and all(item.caption == "a photo" for item in items)
    assert not any(len(item.masks) or item.semantic.any() for item in items)


def test_maps_of_hugging_face_may_be_tables_of_numbers():
    source, labels, metres = object.__new__(hf.HuggingFace), np.eye(16, dtype=int), np.full((16, 16), 2.0)
    metres[0, :5] = np.nan, np.inf, -1, 10, 10.5
    Image.new("RGB", (16, 16)).save(file := io.BytesIO(), "PNG")
    row = {"image": {"bytes": file.getvalue()}, "label": labels.tolist(), "depth": metres.tolist()}
    source.rows, source.path = SimpleNamespace(row=lambda number: row, folder=Path()), Path("photos")
    source.columns = {"caption": "", **{name: name for name in row}}
    source.classes, source.thing_classes, source.max_depth, source.table = ("wall", "ball"), ("ball",), 10.0, {}
    picture = source.picture(0)
    assert picture.depth[0, :6].tolist() == [0, 0, 0, 10, 0, 2] and (picture.semantic == labels).all()
    assert picture.caption == ("ball",) and picture.id == "00000000"
    row["label"] = [row["label"]]
    with pytest.raises(Refused, match="photos: row 0: label is no table of numbers"):
        source.picture(0)


def test_hugging_face_rows_without_a_text_are_captioned_by_their_labels_and_pictures_have_8_bits(copied):
    root, address = copied("hf-imagefolder")
    path = root / "train" / "metadata.jsonl"
    said = open_data(address, SIZE)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "text"}) for row in rows))
    path.write_text(path.read_text().replace("}", f', "note": "{"x" * 70_000_000}"}}', 1))  # more than other lists have
    made = open_data(address, SIZE)
    assert made.captions_name_all and not said.captions_name_all and made[0].caption.startswith("a photo of a ")
    save(root / "train" / "images" / "scene 0.png", np.full((80, SIDE), 300, np.uint16))
    with pytest.raises(Refused, match="row 0, image: its pixels are I;16, expected an 8-bit picture"):
        made[0]


def test_a_table_without_pictures_or_rows_is_refused(copied):
    root, address = copied("hf-parquet")
    files = {path: parquet.read_table(path) for path in (root / "data").glob("*.parquet")}
    for path, table in files.items():
        nothing = pa.array([{"bytes": None, "path": None}] * len(table))
        parquet.write_table(table.set_column(table.schema.get_field_index("image"), "image", nothing), path)
    with pytest.raises(Refused, match="no picture in the column image"):
        open_data(address, SIZE)[0]
    for path, table in files.items():
        parquet.ParquetWriter(path, table.schema).close()
    with pytest.raises(Refused, match="no "):
        open_data(address, SIZE)


def test_class_names_stand_in_the_features_of_a_table(copied):
    root, address = copied("hf-parquet")
    names = json.loads((root / "id2label.json").read_text()).values()
    (root / "id2label.json").unlink()
    with pytest.raises(Refused, match="id2label.json"):
        open_data(address, SIZE)
    path = min((root / "data").glob("*.parquet"))
    table, most = parquet.read_table(path), [f"class {k}" for k in range(255)]
    for known in (most, list(names)):  # all numbers of a map but 255; then those of this one
        feature = {"feature": {"feature": {"names": known, "_type": "ClassLabel"}, "_type": "List"}, "_type": "List"}
        features = json.dumps({"info": {"features": {"label": feature}}})
        parquet.write_table(table.replace_schema_metadata({"huggingface": features}), path)
        assert open_data(address, SIZE).classes == tuple(known)
    assert tuple(names) == world.CLASSES


def test_what_convert_writes_is_read_again(made, tmp_path):
    whole = open_data(f"run:{made('run')}[all]", SIDE)
    for name, kind in (("hf-parquet", "hf"), ("voc", "voc")):
        line = [str(made("run")), "--to", name, "--border", "0"] if name == "voc" else [str(made("run")), "--to", name]
        assert convert.main([*line, "--out", str(tmp_path / name), "--quiet"]) == 0
        found = open_data(f"{kind}:{tmp_path / name / name}", SIDE)
        assert set(found.tasks) <= set(whole.tasks) and len(found) == COUNT and len(found.tasks) >= 3
        for item, truth in zip(found, whole):
            assert [found.classes[k] for k in np.unique(item.semantic)] == [
                whole.classes[k] for k in np.unique(truth.semantic)
            ]
            if name == "voc":  # whose images are JPEG files
                continue
            assert (item.image == truth.image).all() and item.caption == truth.caption
            assert np.allclose(item.depth, truth.depth)
    table, far = tmp_path / "hf-parquet" / "hf-parquet" / "classes.json", whole[0].depth
    table.write_text(json.dumps(json.loads(table.read_text()) | {"max_depth": float(np.median(far))}))
    near = open_data(f"hf:{table.parent}", SIDE)[0].depth
    assert np.allclose(near, np.where(far <= np.median(far), far, 0)) and (near == 0).any()
    for wrong in ({"max_depth": -1}, {"depth_steps_of_a_metre": 0}):
        table.write_text(json.dumps(json.loads(table.read_text()) | {"max_depth": 9.0} | wrong))
        with pytest.raises(Refused, match="a depth out of range"):
            open_data(f"hf:{table.parent}", SIDE)


@pytest.mark.parametrize("name, kind", [("nyu", "nyu"), ("kitti", "kitti"), ("hf-parquet", "hf")])
def test_each_split_of_an_export_is_read_by_its_own_name(copied, tmp_path, name, kind):
    root, _ = copied("run")
    assert splitting.main([str(root), "--shares", "34,33,33", "--quiet"]) == 0
    assert convert.main([str(root), "--to", name, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    parts = [open_data(f"{kind}:{tmp_path / 'out' / name}[{part}]", SIZE) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert len({part[0].image.tobytes() for part in parts}) == COUNT


@pytest.mark.parametrize("column, mode", [("label", "P"), ("label", "I;16"), ("depth", "I;16"), ("image", "CMYK")])
def test_pictures_that_datasets_stores_as_tiff_are_read(copied, column, mode):
    """It does so with pictures in memory that have a palette or 16 bits."""
    root, address = copied("hf-parquet")
    before = open_data(address, SIZE)[0]

    for path in (root / "data").glob("*.parquet"):
        table, cells = parquet.read_table(path), []
        for cell in table[column].to_pylist():
            stored, file = Image.open(io.BytesIO(cell["bytes"])), io.BytesIO()
            pixels = np.asarray(stored)
            changed = Image.fromarray(pixels.astype(np.uint16)) if mode == "I;16" else stored.convert(mode)
            if mode == "P":
                changed = Image.fromarray(pixels)
                changed.putpalette(bytes(range(256)) * 3)
            assert changed.mode == mode
            changed.save(file, "TIFF")
            cells.append({"bytes": file.getvalue(), "path": None})
        place = table.schema.get_field_index(column)
        parquet.write_table(table.set_column(place, column, pa.array(cells)), path)
    after = open_data(address, SIZE)[0]
    assert (after.semantic == before.semantic).all() and (after.depth == before.depth).all()
    assert np.abs(after.image.astype(int) - before.image).max() <= 1


def test_a_tiff_with_compression_is_refused():
    """Its decoders are many, and `datasets` uses none."""
    file = io.BytesIO()
    Image.new("L", (20, 20)).save(file, "TIFF", compression="tiff_lzw")
    with pytest.raises(Refused, match="a TIFF with compression"):
        images.decode_image(file.getvalue(), "a map", may_be_tiff=True)
    with pytest.raises(Refused, match="neither a PNG nor a JPEG"):
        images.decode_image(file.getvalue(), "a map")


def test_one_thread_at_a_time_reads_a_parquet_file(tmp_path, monkeypatch):
    """Arrow may wait for ever where two threads read row groups of one file; a training reads from two."""
    path = tmp_path / "train-00000.parquet"
    parquet.write_table(pa.table({"place": list(range(8))}), path, row_group_size=1)
    real, reading, most = parquet.ParquetFile.read_row_group, [], []

    def watched(file, group):
        reading.append(group)
        most.append(len(reading))
        time.sleep(0.002)
        reading.pop()
        return real(file, group)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", watched)
    rows = tables.open_rows(tmp_path, "train")
    with ThreadPoolExecutor(4) as pool:
        assert [row["place"] for row in pool.map(rows.row, [*range(8)] * 4)] == [*range(8)] * 4
    assert max(most) == 1


def test_what_save_to_disk_writes_is_read_by_its_splits(copied):
    root, address = copied("hf-saved")
    whole = [item.image for item in open_data(address, SIZE)]
    shutil.copytree(root / "train", root / "validation")
    shutil.copy(root / "id2label.json", root / "train")
    for name in (f"{address}[val]", f"{address}[train]", f"{address}/train"):
        assert all((item.image == own).all() for item, own in zip(open_data(name, SIZE), whole, strict=True))
    for name in (f"{address}[test]", f"{address}/train[val]"):
        with pytest.raises(Refused, match="no split"):
            open_data(name, SIZE)
    for state, said in (
        ("[]", "expected an object"),
        ("{}", "not what save_to_disk writes"),
        ('{"_data_files": []}', "it names no file"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "leads out"),
    ):
        (root / "train" / "state.json").write_text(state)
        with pytest.raises(Refused, match=said):
            open_data(address, SIZE)


@pytest.mark.parametrize(
    ("layout", "name", "lines", "reason"),
    [
        ("kitti", "kitti_eigen_train.txt", "\n\na.png\n", "line 3 names no image and depth"),
        ("hf-imagefolder", "train/metadata.jsonl", "\n[]\n", "line 2: holds a JSON list"),
        ("yolo-seg", "labels/train/000000.txt", "\n \nball\n", "line 3: not a class"),
        ("celebamask-hq", "CelebA-HQ-to-CelebA-mapping.txt", "idx orig_idx\n\n0\n", "line 3 is not the number"),
    ],
)
def test_lines_are_counted_with_the_empty_ones(copied, layout, name, lines, reason):
    root, address = copied(layout)
    (root / name).write_text(lines)
    with pytest.raises(Refused, match=reason):
        open_data(address, SIZE)[0]


def test_a_damaged_hugging_face_folder_is_refused(copied):
    root, address = copied("hf-parquet")
    for file in root.rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(Refused):
        list(open_data(address, SIZE))


# Streams of JSON ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [16, 64, 1000, 2**20])
def test_a_stream_gives_what_json_gives_whatever_its_window(tmp_path, monkeypatch, window):
    from datasetdm_fast.untrusted import json_stream

    monkeypatch.setattr(json_stream, "WINDOW", window)
    document = {
        "a": [{"x": 'é\n"]}', "y": [1, 2.5, None]}, 7, "text", []],
        "b": {"c": [1]},
        "d": [],
        "e": 123456789,
        "日本": [True],
    }
    for indent in (None, 3):
        path = tmp_path / "x.json"
        path.write_text(json.dumps(document, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
        stream = JsonStream(path)
        found: dict = {}
        for key, value, start, end in stream:
            assert stream.at(start, end) == value
            found.setdefault(key, []).append(value)
        assert found == {"a": document["a"], "b": [document["b"]], "e": [123456789], "日本": [True]}
        assert stream.keys == set(document)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1, 2',
        '{"a": 1',
        '{"a" 1}',
        '{"a": [1,]}',
        '{"a": 1, "a": 2}',
        '{"a": [{"b": 1, "b": 2}]}',
        "{} x",
        "{1: 2}",
        "[",
        '{"a": ["\xff',
    ],
)
def test_a_broken_stream_is_refused_with_its_place(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(Refused, match=r"x\.json.*(byte|JSON)"):
        list(JsonStream(path))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"image": np.zeros((4, 6), np.uint8)}, "image: uint8 of shape [4, 6], expected uint8 of shape [4, 6, 3]"),
        ({"image": np.zeros((4, 6, 3))}, "image: float64 of shape [4, 6, 3], expected uint8"),
        (
            {"semantic": np.zeros((4, 4), np.uint8)},
            "semantic: uint8 of shape [4, 4], expected integers of shape [4, 6]",
        ),
        ({"depth": np.zeros((4, 6), np.uint16)}, "depth: uint16 of shape [4, 6], expected floating-point numbers"),
    ],
)
def test_a_reader_that_gives_arrays_of_another_form_is_told_so(wrong, said):
    given = {"image": np.zeros((4, 6, 3), np.uint8), "semantic": np.zeros((4, 6), np.uint8)}
    Picture("a", caption="a photo", **given)
    with pytest.raises(ValueError) as stop:
        Picture("a", caption="a photo", **given | wrong)
    assert said in str(stop.value)


def test_bitmaps_polygons_and_rectangles_of_supervisely_become_masks(tmp_path):
    """Corners are pixels, both ends included; the bitmap is one of Supervisely's documentation, a ring of 3 x 3."""
    ring = (
        "eJzrDPBz5+WS4mJgYOD19HAJAtLMIMwIInOeqf8BUmwBPiGuQPr///9Lb86/C2QxlgT5BTM4PLuRBuTwebo4hlTMSa44sKHhISMDuxpTYrr03F6g"
        "DIOnq5/LOqeEJgDM5ht6"
    )
    figures = [
        ("ring", "bitmap", {"bitmap": {"data": ring, "origin": [1, 2]}}),
        ("box", "rectangle", {"points": {"exterior": [[5, 1], [8, 3]], "interior": []}}),
        (
            "frame",
            "polygon",
            {
                "points": {
                    "exterior": [[9, 9], [15, 9], [15, 15], [9, 15]],
                    "interior": [[[11, 11], [13, 11], [13, 12], [11, 12]], [[11, 13], [13, 13], [13, 13], [11, 13]]],
                }
            },
        ),
        ("dot", "point", {"points": {"exterior": [[3, 3]], "interior": []}}),
    ]
    for name, pixels in (("first", 16), ("second", 16)):
        save(tmp_path / name / "img" / "photo.png", np.zeros((pixels, pixels, 3), np.uint8))
        objects = [{"classTitle": kind, "geometryType": form} | facts for kind, form, facts in figures]
        document = {"size": {"height": 16, "width": 16}, "objects": objects if name == "first" else [], "tags": []}
        text(tmp_path / name / "ann" / "photo.png.json", json.dumps(document))
    classes = [{"title": kind, "shape": form, "color": "#fff"} for kind, form, _ in figures]
    text(tmp_path / "meta.json", json.dumps({"classes": classes, "tags": []}))

    source = open_data(f"supervisely:{tmp_path}", 16)
    assert source.thing_classes == ("ring", "box", "frame") and len(source) == 2
    masks = dict(zip(("ring", "box", "frame"), source[0].masks))
    assert np.argwhere(masks["ring"]).tolist() == [[y, x] for y in (2, 3, 4) for x in (1, 2, 3) if (y, x) != (3, 2)]
    assert np.argwhere(masks["box"]).tolist() == [[y, x] for y in (1, 2, 3) for x in (5, 6, 7, 8)]
    assert (
        masks["frame"][9:, 9:].sum() == masks["frame"].sum() == 7 * 7 - 3 * 3 and not masks["frame"][11:14, 11:14].any()
    )
    assert len(open_data(f"supervisely:{tmp_path}[second]", 16)) == 1
    text(tmp_path / "meta.json", json.dumps({"classes": classes[:1], "tags": []}))
    with pytest.raises(Refused, match="shape 1: the unknown class 'box'.*meta.json"):
        open_data(f"supervisely:{tmp_path}", 16)[0]


def test_the_eight_letters_of_an_upload_are_left_out_of_its_name():
    for url, tails in (
        ("/data/upload/1/0a1b2c3d-my-cat.jpg", ["0a1b2c3d-my-cat.jpg", "my-cat.jpg"]),
        ("/data/upload/1/one-photo.jpg", ["one-photo.jpg"]),
        ("/data/local-files/?d=in%20all/a.jpg", ["a.jpg", "in all/a.jpg"]),
        ("https://example.org/%20a.jpg?size=2", [" a.jpg"]),
        ("/x/one-photo.jpg", ["one-photo.jpg", "x/one-photo.jpg"]),
    ):
        assert label_studio._tails(url)[: len(tails)] == tails
    assert label_studio._tails("") == []


def packed(numbers: list[int], width: int = 8) -> list[int]:
    """A brush as Label Studio packs it: the count, the width of numbers, four widths of lengths; then one run for each
    stretch of equal numbers, or of unequal ones.
    """
    bits = f"{len(numbers):032b}{width - 1:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    runs = [[*group] for _, group in itertools.groupby(numbers)]
    for run in runs:
        if len(run) > 1:
            bits += f"1{3:02b}{len(run) - 1:016b}{run[0]:0{width}b}"
        else:
            bits += f"0{0:02b}{0:03b}{run[0]:0{width}b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def test_outlines_are_drawn_where_they_lie_and_refused_far_outside():
    def corners(mask):
        rows, columns = np.nonzero(mask())
        return columns.min(), columns.max(), rows.min(), rows.max(), mask().sum()

    sides = (20, 30)
    assert corners(shapes.box((2, 3, 12, 7), sides)) == (2, 11, 3, 6, 40)
    assert corners(shapes.box((2, 3, 12, 7), sides, 90)) == (5, 8, 0, 9, 40)  # about (7, 5)
    left, right, top, bottom, area = corners(shapes.ellipse((15, 8), (10, 4), sides))
    assert (left, right, top, bottom) == (5, 24, 4, 11) and area == pytest.approx(math.pi * 40, rel=0.03)
    assert corners(shapes.ellipse((15, 10), (10, 4), sides, 90))[:4] == (11, 18, 0, 19)
    turned = shapes.box((5, 9, 25, 11), sides, 30)()  # clockwise, as rows are counted from the top
    assert turned[14, 23] and turned[5, 6] and not turned[5, 23] and not turned[14, 6]
    triangle = [-30, -20, 60, -20, 60, 40]  # as far outside as it may lie
    assert shapes.polygon(triangle, sides)().any()
    for place, (away, said) in itertools.product(range(6), ((-31, "outside"), (61, "outside"))):
        with pytest.raises(ValueError, match=said):
            shapes.polygon([*triangle[:place], away, *triangle[place + 1 :]], sides)
    for place, away in ((1, -21), (5, 41)):
        with pytest.raises(ValueError, match="far outside"):
            shapes.polygon([*triangle[:place], away, *triangle[place + 1 :]], sides)
    for numbers in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7], [1, 2] * 100_001):
        with pytest.raises(ValueError, match=f"a polygon of {len(numbers)} numbers"):
            shapes.polygon(numbers, sides)
    assert shapes.polygon([1, 2] * 100_000, sides)
    small = np.array([[True, False, True], [True, True, True]])
    for left, top in ((0, 0), (27, 18), (4.4, 6.6)):
        found = shapes.place_inside(small, left, top, sides)()
        assert found.sum() == 5 and np.array_equal(found[round(top) :, round(left) :][:2, :3], small)
    for left, top in ((-1, 0), (0, -1), (28, 0), (0, 19)):
        with pytest.raises(ValueError, match="lies outside"):
            shapes.place_inside(small, left, top, sides)


def test_a_label_of_hugging_face_is_a_column_of_maps_before_one_of_anything_but_numbers():
    row = {"label": 3, "mask": "no picture", "semantic": "a.png", "depth": 1.5, "other": None}
    assert hf._map_column(("label", "mask", "semantic"), tuple(row), row) == "semantic"
    assert hf._map_column(("label", "mask"), tuple(row), row) == "mask"
    assert hf._map_column(("label", "depth"), tuple(row), row) == hf._map_column(("other",), ("label",), row) == ""
    assert hf._map_column(("label", "other"), tuple(row), row) == "other"


def test_the_address_of_a_run_may_be_a_url():
    assert readers.check_address("run:s3://bucket/run") == ("run", "s3://bucket/run", None)
    assert readers.check_address("run:s3://bucket/run[corrected]") == ("run", "s3://bucket/run", "corrected")


@pytest.mark.parametrize(
    ("seed", "kind", "area", "colour", "around", "distance"),
    [
        (100, "ball", 3166, (32.5, 125.0, 43.3), (191.9, 148.9, 145.1), 1.4117),
        (101, "cube", 2492, (28.8, 65.0, 186.3), (93.6, 102.4, 96.1), 1.7469),
        (102, "cone", 1148, (203.3, 105.5, 22.4), (96.9, 107.0, 117.0), 1.7987),
        (103, "ring", 4048, (175.6, 31.5, 29.7), (182.2, 143.0, 160.4), 1.3722),
        (104, "star", 1951, (35.9, 141.1, 47.7), (137.4, 125.2, 95.7), 1.6866),
        (105, "tree", 2882, (159.8, 156.5, 153.6), (101.9, 112.2, 104.0), 1.1923),
        (106, "person", 3017, (62.2, 106.8, 68.7), (186.1, 151.4, 150.0), 1.3421),
    ],
)
def test_the_world_that_the_demo_model_learnt_stays(seed, kind, area, colour, around, distance):
    view = world.view(seed, count=1, kinds=(kind,), domain="day")
    thing = view.instance == 1
    assert abs(int(thing.sum()) - area) <= 3 and abs(float(view.depth[thing].mean()) - distance) < 1e-3
    assert np.allclose(view.image[thing].mean(0), colour, atol=0.5)
    assert np.allclose(view.image[~thing].mean(0), around, atol=0.5)


def test_joints_of_people_are_visible_hidden_or_outside():
    instance = np.zeros((4, 4), np.int32)
    instance[0, 3], instance[3, 0], instance[2, 2] = 1, 2, 2
    points = [(3.9, 0.0), (0.0, 3.9), (2.5, 2.5), (4.0, 0.5), (0.5, 4.0), (-0.1, 3.0), (3.0, -0.1), (9.0, 9.0)]
    keypoints = {k: np.array([[*point, 0.0] for point in points]) for k in (1, 2)}
    world.mark_visible(keypoints, instance)
    assert keypoints[1][:, 2].tolist() == [2, 1, 1, 0, 0, 0, 0, 0]
    assert keypoints[2][:, 2].tolist() == [1, 2, 2, 0, 0, 0, 0, 0]


def test_a_rectangle_of_label_studio_turns_about_its_first_corner():
    value = {"x": 50.0, "y": 10.0, "width": 40.0, "height": 20.0, "rotation": 30}
    mask = label_studio._mask({"type": "rectanglelabels", "value": value}, (60, 100))()
    down, right = np.mgrid[:60, :100] + 0.5 - np.array([6, 50])[:, None, None]
    cosine, sine = math.sqrt(3) / 2, 0.5
    along, across = cosine * right + sine * down, cosine * down - sine * right
    inside = np.minimum(np.minimum(along, 40 - along), np.minimum(across, 12 - across))  # pixels from its edges
    assert mask[inside > 1].all() and not mask[inside < -1].any() and abs(mask.sum() - 40 * 12) < 10


def test_brushes_and_outlines_of_label_studio_become_masks(tmp_path):
    """Lengths are percents; a rectangle turns about its first corner, clockwise."""
    brush = np.zeros((20, 40, 4), np.uint8)
    brush[2:4, 3:8, 3] = 255
    value = {"x": 50.0, "y": 50.0, "width": 20.0, "height": 10.0, "rotation": 90}
    results = [
        ("brushlabels", {"format": "rle", "rle": packed(brush.ravel().tolist()), "brushlabels": ["cat"]}),
        ("rectanglelabels", value | {"rectanglelabels": ["box"]}),
        ("polygonlabels", {"points": [[0, 0], [25, 0], [25, 20], [0, 20]], "polygonlabels": ["box"]}),
        ("ellipselabels", {"x": 75, "y": 50, "radiusX": 20, "radiusY": 40, "ellipselabels": ["cat"]}),
        ("choices", {"choices": ["good"]}),
    ]
    sides = {"original_width": 40, "original_height": 20}
    results = [sides | {"type": kind, "value": facts} for kind, facts in results]
    cancelled = {"was_cancelled": True, "result": []}
    export = [
        {
            "data": {"image": "/data/upload/3/0a1b2c3d-a%20cat.png"},
            "annotations": [cancelled, {"result": results}, {"result": []}],  # the first of two people counts
        },
        {"data": {"image": "/data/local-files/?d=photos/none.png"}, "annotations": [{"result": []}]},
        {"data": {"image": "s3://photos/later.png"}, "annotations": [cancelled]},
    ]
    text(tmp_path / "project.json", json.dumps(export))
    for name in ("images/a cat.png", "images/none.png"):
        save(tmp_path / name, np.zeros((20, 40, 3), np.uint8))
    for place in (tmp_path, tmp_path / "project.json"):
        source = open_data(f"label-studio:{place}", 20)
        assert source.thing_classes == ("box", "cat") and len(source) == 2 and not len(source[1].masks)
    picture = source.picture(0)
    masks = [make() for make in picture.masks]
    assert [source.thing_classes[k] for k in picture.mask_classes] == ["cat", "box", "box", "cat"]
    assert np.argwhere(masks[0]).tolist() == [[y, x] for y in (2, 3) for x in range(3, 8)]
    assert np.argwhere(masks[1]).tolist() == [[y, x] for y in range(10, 18) for x in (18, 19)]
    assert np.argwhere(masks[2]).tolist() == [[y, x] for y in range(4) for x in range(10)]
    assert masks[3].sum() == pytest.approx(np.pi * 8 * 8, rel=0.05)
    for damage, words in ((lambda rle: rle[:20], "ends too early"), (lambda rle: [0, 0, 0, 9], "of 9 numbers, 3200")):
        export[0]["annotations"][1]["result"][0]["value"]["rle"] = damage(packed(brush.ravel().tolist()))
        text(tmp_path / "project.json", json.dumps(export))
        with pytest.raises(Refused, match=f"a cat.png, shape 0: a brush .*{words}"):
            open_data(f"label-studio:{tmp_path}", 20).picture(0)
    for wrong in (1, {"result": 1}, {"result": [{"type": "polygonlabels", "value": []}]}):
        text(tmp_path / "project.json", json.dumps([{"data": {}, "annotations": wrong if wrong == 1 else [wrong]}]))
        with pytest.raises(Refused, match="not what Label Studio writes"):
            open_data(f"label-studio:{tmp_path}", 20)
    for predictions, told in (([{"result": results}], "but predictions: .* Predictions"), ([], "annotations$")):
        text(tmp_path / "project.json", json.dumps([{"data": {}, "annotations": [], "predictions": predictions}]))
        with pytest.raises(Refused) as refused:
            open_data(f"label-studio:{tmp_path}", 20)
        assert re.search(told, refused.value.cause)


@pytest.mark.parametrize("root", ["", "images"])
def test_pictures_of_one_name_in_label_studio_are_told_apart_by_their_folders(tmp_path, root):
    outline = {"points": [[0, 0], [25, 0], [25, 20]], "polygonlabels": ["cat"]}
    result = [{"type": "polygonlabels", "value": outline, "original_width": 40, "original_height": 20}]
    urls = ("/data/local-files/?d=photos/x/a.png", "/data/local-files/?d=photos%5Cy%5Ca.png")
    tasks = [{"data": {"text": "two cats", "image": url}, "annotations": [{"result": result}]} for url in urls]
    text(tmp_path / "project.json", json.dumps([*tasks, tasks[0]]))
    save(tmp_path / root / "a.png", np.zeros((20, 40, 3), np.uint8))
    with pytest.raises(Missing, match="x/a.png"):
        open_data(f"label-studio:{tmp_path}", 20).picture(0)
    for folder, shade in (("x", 100), ("y", 200)):
        save(tmp_path / root / folder / "a.png", np.full((20, 40, 3), shade, np.uint8))
    source = open_data(f"label-studio:{tmp_path}", 20)
    assert [source.picture(record).image.mean() for record in range(3)] == [100, 200, 100]
    for data, words in (({"image": "http://other/photos/x/a.png"}, "as another does"), ({}, "names no picture")):
        text(tmp_path / "project.json", json.dumps([tasks[0], {**tasks[0], "data": data}]))
        with pytest.raises(Refused, match=f"task 1 .*{words}"):
            open_data(f"label-studio:{tmp_path}", 20).picture(1)
    source = open_data(f"label-studio:{tmp_path}", 20, skip_bad=True)
    assert [item.id for item in source] == ["a"] and [*source.skipped] == [f"{tmp_path}/project.json: task 1"]


def test_data_of_crowds_alone_are_refused_for_that(copied):
    root, address = copied("coco")
    for path in root.glob("annotations/instances*.json"):
        rewrite(path, lambda found: [each.update(iscrowd=1) for each in found["annotations"]])
    source = open_data(address, SIZE, tasks=["instance"])
    with pytest.raises(Refused, match="none of .* images shows") as caught:
        check_truth(source, "instance", address)
    assert "iscrowd 0" in caught.value.remedy

    class Items(list):
        thing_classes, classes, joints, max_depth = world.THINGS, (), (), 0.0

    none = {"masks": np.zeros((0, SIZE, SIZE), bool), "mask_classes": np.zeros(0, np.int64)}
    empty = replace(source[0], semantic=None, crowds=None, crowd_classes=None, **none)
    for items, remedy in (([source[0], empty], "iscrowd 0"), ([empty, empty], "Check the labels")):
        with pytest.raises(Refused, match="none of 2 images shows") as caught:
            check_truth(Items(items), "instance", address)
        assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("task", "facts", "said"),
    [
        ("depth", {"depth": None}, "item .* has no depth, which depth needs"),
        ("open-vocabulary", {"masks": None, "semantic": None}, "no masks and no semantic, which open-vocabulary needs"),
        ("instance", {}, "the data set names no thing_classes, which instance needs"),
    ],
)
def test_items_of_another_reader_lack_no_truth_that_it_promised(task, facts, said):
    class Items(list):
        thing_classes, max_depth = (), 10.0

    with pytest.raises(Refused, match=f"--data other:x: .*{said}"):
        check_truth(Items([replace(open_data("demo:1@900000", SIZE)[0], **facts)]), task, "other:x")


def test_words_are_learnt_from_masks_where_there_is_no_map():
    class Items(list):
        thing_classes, classes, joints, max_depth, class_table = world.THINGS, (), (), 0.0, None

    item = replace(open_data("demo:1@900000", SIZE)[0], semantic=None, keypoints=None, depth=None)
    assert check_truth(Items([item]), "open-vocabulary", "other:x") is None


def test_a_wrong_layout_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "load_model", None)
    (tmp_path / "photos").mkdir()
    for kind in ("coco", "labelme", "voc", "folder"):
        with pytest.raises(Refused):
            session.open_session(
                TrainingData(f"{kind}:{tmp_path}"),
                ModelChoice("tiny"),
                ["semantic"],
                Inversion(),
            )


def test_a_folder_called_as_its_kind_is_the_data_set_in_an_export_alone(tmp_path):
    (tmp_path / "voc").mkdir()
    assert readers.check_address(f"voc:{tmp_path}") == ("voc", tmp_path, None)
    (tmp_path / "export.json").write_text("{}")
    assert readers.check_address(f"voc:{tmp_path}[val]") == ("voc", tmp_path / "voc", "val")
    assert readers.check_address(f"coco:{tmp_path}") == ("coco", tmp_path, None)


def test_a_folder_is_read_where_the_reader_of_an_address_looks(tmp_path):
    inside = tmp_path / "data" / "deep"
    assert is_read(f"coco:{tmp_path / 'data'}", inside) and is_read(f"coco:{inside}", inside)
    assert not is_read(f"coco:{inside}", tmp_path / "data") and not is_read("demo:40", inside)
    assert not is_read(f"folder:{tmp_path / 'data'}", inside) and is_read(f"folder:{tmp_path / 'data'}[deep]", inside)


@pytest.mark.parametrize("kind", ["box", "ellipse"])
def test_a_positive_angle_turns_an_outline_clockwise_about_its_centre(kind):
    """Of 12 x 4 pixels around (16, 16): its right end comes to lie below, at about (20, 20)."""
    outline = {"box": [(10, 14, 22, 18)], "ellipse": [(16, 16), (6, 2)]}[kind]
    places = {"box": 'xtl="10" ytl="14" xbr="22" ybr="18"', "ellipse": 'cx="16" cy="16" rx="6" ry="2"'}[kind]
    of_cvat = ElementTree.fromstring(f'<{kind} {places} rotation="45"/>')
    for make in (getattr(shapes, kind)(*outline, (32, 32), 45), cvat._mask(of_cvat, (32, 32))):
        mask = make()
        assert mask[19, 19] and mask[12, 12] and not mask[12, 19] and not mask[19, 12] and not mask[16, 21]


def test_pictures_in_memory_have_16_pixels_a_side_and_8_bits():
    for side, is_taken in ((16, True), (15, False)):
        with nullcontext() if is_taken else pytest.raises(Refused, match="image 0: uint8 of shape"):
            assert framing.pictures_in_memory([np.zeros((side, 40, 3), np.uint8)]).names == ["0"]
    for mode in ("I", "I;16", "F"):
        with pytest.raises(Refused, match=f"image 1: its pixels are {mode}, expected an 8-bit picture"):
            framing.pictures_in_memory([np.zeros((16, 16, 3), np.uint8), Image.new(mode, (16, 16))])
    turned = Image.fromarray(np.arange(16 * 20 * 3, dtype=np.uint16).reshape(16, 20, 3).astype(np.uint8))
    turned.getexif()[reading.ORIENTATION] = 3  # upside down
    assert (framing.pictures_in_memory([turned]).whole(0) == np.array(turned)[::-1, ::-1]).all()


def test_the_rule_of_upstream_draws_each_item_anew():
    class Told(LabelledSource):
        def load(self, record, seed):
            return record, seed

    source = Told(64, 4)
    assert list(source) == [(k, None) for k in range(4)]
    source.framing = "upstream"
    chosen = source.subset([3, 1])
    assert list(chosen) == [(3, 0), (1, 1)] and chosen.draw_view(1, 9) == (1, 9) and len(source) == 4
    for index in (-1, 2):
        with pytest.raises(IndexError):
            chosen[index]
    assert list(source.subset([])) == [] and len(source.subset([]).readable()) == 0


def test_what_a_part_of_the_library_lacks_keeps_its_remedy():
    def fail(error, cause=None):
        error.__cause__ = cause
        raise error

    for error, cause, remedy in (
        (Missing("x: no such library", "Install it."), None, "Install it."),
        (Missing("x: cannot be read", "Look."), OSError("x"), reading.REPAIR),
        (OSError(2, "none", "x.png"), None, reading.REPAIR),
    ):
        with pytest.raises(Refused) as stop:
            LabelledSource(64, 1).guard(fail, error, cause)
        assert stop.value.remedy == remedy


def test_captions_that_are_made_name_every_class_in_an_order_of_each_picture():
    image, names = np.zeros((16, 16, 3), np.uint8), ("cat", "dog", "cup", "car")
    orders = {Picture(str(k), image, names).named for k in range(20)}
    assert len(orders) > 5 and all(sorted(order) == sorted(names) for order in orders)
    one = Picture("a", image, ("cat",))
    assert one.named == ("cat",) and one.text == "" and Picture("a", image, "a cat").named is None


def test_things_of_a_label_map_are_its_classes_that_are_things():
    source = LabelledSource(4, 1)
    source.classes, source.thing_classes = ("wall", "cat", "dog", "cup"), ("dog", "cat")
    item = Labelled("0", np.zeros((2, 2, 3), np.uint8), "", semantic=np.uint8([[0, 1], [2, 255]]))
    found = {name: mask.astype(int).tolist() for name, mask in source.things_of(item)}
    assert found == {"cat": [[0, 1], [0, 0]], "dog": [[0, 0], [1, 0]]}


def test_a_window_keeps_small_crowds_and_measures_persons_in_its_pixels():
    image, dot = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), bool)
    dot[4, 4] = True
    picture = Picture(
        "0",
        image,
        "",
        masks=(lambda: dot,),
        mask_classes=(0,),
        crowds=(lambda: dot,),
        crowd_classes=(-1,),
        keypoints=np.float32([[[4, 6, 2], [20, 6, 1]], [[20, 20, 2], [21, 21, 2]]]),
        keypoint_boxes=np.float32([[2, 4, 20, 8], [18, 18, 4, 4]]),
        keypoint_areas=np.float32([100, 16]),
    )
    found = framing.frame_picture(picture, framing.Window(0, 0, 2.0), 32, least_mask=9.0)
    assert len(found.masks) == 0 and found.crowds.sum((1, 2)).tolist() == [4] and found.crowd_classes.tolist() == [-1]
    assert found.keypoints.tolist() == [[[8, 12, 2], [40, 12, 0]]] and found.keypoint_areas.tolist() == [400]
    assert found.keypoint_boxes.tolist() == [[4, 8, 28, 16]]


def test_a_link_that_leads_back_up_is_followed_once(tmp_path):
    for place in ("data/a", "others"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "b.png").write_bytes(b"")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "others")
    found = reading.listing(tmp_path / "data", ".png")
    assert [path.relative_to(tmp_path / "data").as_posix() for path in found] == ["a/b.png", "linked/b.png"]


def test_lines_end_as_in_every_system_and_pairs_without_a_depth_are_left_out(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("a b\u2028c d\r\n\r e\x0bf \nlast None\n".encode())
    assert reading.numbered_lines(path) == [(1, "a b\u2028c d"), (3, "e\x0bf"), (4, "last None")]
    path.write_text("a.png a_depth.png\nb.png None\nc.png c_depth.png 0.5\n")
    assert reading.pairs(path) == [("a.png", "a_depth.png"), ("c.png", "c_depth.png")]


def test_of_two_label_files_that_differ_in_capitals_the_usual_one_is_read(tmp_path):
    for name in ("c.PNG", "c.png"):
        (tmp_path / name).write_bytes(b"")
    assert reading.label_file(tmp_path, "c", ".png").name == "c.png"


def test_lists_of_names_and_depths_reach_just_to_their_bounds(tmp_path):
    path = tmp_path / "names.txt"
    for length, is_taken in ((200, True), (201, False)):
        path.write_text(f"_background_\n{'a' * length}\n")
        with nullcontext() if is_taken else pytest.raises(Refused, match="not short and different"):
            assert reading.class_file(path) == ("background", "a" * length)
    assert reading.without_background(("background", "none", "cat")) == ("none", "cat")
    path = tmp_path / "depth.txt"
    for metres, is_taken in ((65535, True), (65536, False), (0, False), ("nan", False)):
        path.write_text(f"{metres}\n")
        with nullcontext() if is_taken else pytest.raises(Refused, match="no number of metres up to 65535"):
            assert reading.farthest_depth(path) == metres


def test_a_window_beside_the_picture_is_black():
    shown = framing.frame_picture(ramp(50, 50), framing.Window(60, 0, 1), 16)
    assert not shown.image.any() and (shown.semantic == 255).all()


@pytest.mark.parametrize(
    ("text", "metres"),
    [("80\n", 80), ("65.5", 65.5), ("far", None), ("0", None), ("-1", None), ("nan", None), ("1e9", None)],
)
def test_the_farthest_depth_is_a_number_of_metres(tmp_path, text, metres):
    assert reading.farthest_depth(tmp_path / "max_depth.txt") == 10
    (tmp_path / "max_depth.txt").write_text(text)
    if metres:
        assert reading.farthest_depth(tmp_path / "max_depth.txt") == metres
    else:
        with pytest.raises(Refused, match="max_depth.txt: no number of metres up to"):
            reading.farthest_depth(tmp_path / "max_depth.txt")


def test_a_mask_may_be_smaller_by_a_whole_factor_and_grey_beside_an_opaque_channel(tmp_path):
    mask = np.zeros((8, 16), np.uint8)
    mask[1, 2:5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = reading.binary_mask(tmp_path / "mask.png", (16, 32), may_be_smaller=True)
    assert found.shape == (16, 32) and (found == (mask > 0).repeat(2, 0).repeat(2, 1)).all()
    with pytest.raises(Refused, match="16 x 8 pixels, but its image has 32 x 16"):
        reading.binary_mask(tmp_path / "mask.png", (16, 32))
    Image.fromarray(np.stack([mask, np.full_like(mask, 255)], 2), "LA").save(tmp_path / "mask.png")
    assert (reading.binary_mask(tmp_path / "mask.png", (8, 16)) == (mask > 0)).all()


def test_pictures_that_a_program_turned_are_as_shown_unless_only_as_stored_they_have_its_size():
    stored, upright, square = Image.new("RGB", (20, 30)), Image.new("RGB", (30, 20)), Image.new("RGB", (30, 30))
    for size, first, second, wanted in (
        ((20, 30), stored, upright, stored),
        ((30, 20), stored, upright, upright),
        ((99, 99), stored, upright, upright),
        ((30, 30), square, square.copy(), None),
    ):
        assert reading.as_drawn(size)("a.jpg", first, second) is (wanted or second)
    for size, wanted in (((20, 30), stored), ((30, 20), upright), ((99, 99), stored)):
        assert reading.as_sized("a.png", lambda: size)("a.jpg", stored, upright) is wanted, "of labels on either"  # noqa: B023


def test_depths_count_up_to_the_farthest_one(tmp_path):
    Image.fromarray(np.full((16, 16), 2000, np.uint16)).save(tmp_path / "depth.png")
    for farthest, metres in ((2.0, 2.0), (1.999, 0.0)):
        found = reading.depth_map(tmp_path / "depth.png", (16, 16), 1000.0, farthest)
        assert found.dtype == np.float32 and (found == metres).all()


def test_a_binary_mask_of_16_bits_is_refused(tmp_path):
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "mask.png")
    with pytest.raises(Refused, match="mask.png: its pixels are I;16, expected 0 and 255"):
        reading.binary_mask(tmp_path / "mask.png", (16, 16))


def test_a_picture_whose_exif_data_are_broken_is_refused():
    class Broken(Image.Image):
        def getexif(self):
            raise SyntaxError("not a TIFF file")

    image = Image.new("RGB", (32, 32))
    image.__class__ = Broken
    with pytest.raises(Refused, match=r"a.jpg: its EXIF data cannot be read \(SyntaxError\)"):
        reading.colours("a.jpg", image, reading.as_shown)
    with pytest.raises(Refused, match="image 0: its EXIF data cannot be read") as refusal:
        framing.pictures_in_memory([image])
    assert refusal.value.remedy == "Give another image."


def test_an_item_beyond_the_end_is_an_index_error_and_a_file_that_fails_bad_data(made):
    source = open_data(f"coco:{made('coco')}", SIZE)
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]

    def fail():
        raise OSError(5, "Input/output error", "a.png")

    with pytest.raises(Refused, match="a.png: Input/output error"):
        source.guard(fail)
    assert source.things_of(SimpleNamespace(masks=None, semantic=None)) == []


def test_items_of_coco_come_by_the_ids_of_their_images_and_persons_of_crowds_are_none(tmp_path):
    facts = {"width": 32, "height": 24}
    whole = {"category_id": 1, "bbox": [2, 2, 8, 8], "segmentation": [[2, 2, 10, 2, 10, 10, 2, 10]], "area": 64}
    whole |= {"num_keypoints": 1, "keypoints": [4, 4, 2, 0, 0, 0]}
    rows = ((1, 7, 0), (2, 3, 1), (4, 3, 0), (5, 7, 0))  # id, image, is a crowd
    document = {
        "images": [{"id": 7, "file_name": "b.png"} | facts, {"id": 3, "file_name": "a.png"} | facts],
        "categories": [{"id": 1, "name": "owl", "keypoints": ["eye", "beak"]}],
        "annotations": [{**whole, "id": k, "image_id": image, "iscrowd": crowd} for k, image, crowd in rows],
    }
    text(tmp_path / "annotations.json", json.dumps(document))
    for name in "ab":
        save(tmp_path / f"{name}.png", np.zeros((24, 32, 3), np.uint8))
    address = f"coco:{tmp_path}"
    assert [item.id for item in open_data(address, SIZE, tasks=["instance"])] == ["a", "b"]
    people = open_data(address, SIZE, tasks=["pose"])
    assert [item.id for item in people] == ["a_4", "b_1", "b_5"]
    for height, width in ((24, 31), (23, 32)):
        save(tmp_path / "a.png", np.zeros((height, width, 3), np.uint8))
        with pytest.raises(Refused, match=f"a.png: {width} x {height} pixels, but annotations.json says 32 x 24"):
            people.picture(0)


def test_of_several_files_of_coco_the_published_one_and_the_longest_path_count(tmp_path):
    for place in ("annotations/instances_val2017.json", "annotations/instances_val.json", "a.png", "day/a.png"):
        text(tmp_path / place, "{}")
    assert coco_layout.find_layout(tmp_path, "val").things.name == "instances_val2017.json"
    pictures = coco_layout.PictureFolder(tmp_path, is_foreign=True)
    assert pictures.path_of("C:\\photos\\day\\a.png", tmp_path) == tmp_path / "day/a.png"
    assert pictures.path_of("/photos/night/a.png", tmp_path) == tmp_path / "a.png"


def test_the_first_decoder_of_a_task_of_a_run_is_the_truth_where_the_brackets_name_none(tmp_path, monkeypatch):
    tables = {f"semantic:{name}": {"classes": ["background", name]} for name in ("cat", "dog")}
    tables |= {f"depth:{name}": {"max_depth": farthest} for name, farthest in (("near", 10), ("far", 80))}
    row = SimpleNamespace(request=SimpleNamespace(index=0, id="00000000"), trust=Trust(), recipe={"origins": []})
    run = SimpleNamespace(path=tmp_path, tasks=(*tables,), document={"labels": tables}, rows=lambda parts: [row])
    monkeypatch.setattr(run_reader, "Run", lambda path, kept: run)
    for split, classes in (("train", ("background", "cat")), ("semantic.dog", ("background", "dog"))):
        source = run_reader.RunSamples(tmp_path, split, SIZE, ())
        assert source.labels == {"semantic": "semantic:cat", "depth": "depth:near"}
        assert (source.classes, source.max_depth) == (classes, 10)


def test_rows_of_hugging_face_are_those_of_the_split_and_of_no_other_that_begins_alike(tmp_path):
    names = ("train/a.png", "train_more/b.png", "validation/c.png")
    text(tmp_path / "metadata.jsonl", "\n".join(json.dumps({"file_name": name}) for name in names))
    for split, shown in (("train", names[:1]), ("val", names[2:])):
        assert [row["image"] for row in tables.open_rows(tmp_path, split).rows] == [*shown]
    text(tmp_path / "metadata.jsonl", "\n".join(json.dumps({"file_name": name[-5:]}) for name in names))
    assert len(tables.open_rows(tmp_path, "train")) == 3  # all where the names tell no split
    with pytest.raises(Refused, match="no split 'val'"):
        tables.open_rows(tmp_path, "val")
    (tmp_path / "metadata.jsonl").unlink()
    for number, name in enumerate(("train-0", "train-1", "train_more-0", "trainval-0", "test")):
        parquet.write_table(pa.table({"image": [str(number)]}), tmp_path / f"{name}.parquet")
    rows = tables.open_rows(tmp_path, "train")
    assert [rows.row(k)["image"] for k in range(len(rows))] == ["0", "1"]
    assert tables.open_rows(tmp_path, "test").row(0) == {"image": "4"}


def test_a_column_named_caption_is_taken_before_a_text_and_a_text_before_a_prompt(tmp_path):
    save(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    save(tmp_path / "b.png", np.full((16, 16), 250, np.uint16))
    text(tmp_path / "classes.json", json.dumps({"max_depth": 10, "depth_steps_of_a_metre": 100}))
    row = {"file_name": "a.png", "depth_file_name": "b.png", "prompt": "p", "text": "t", "caption": "c"}
    for caption in ("c", "t", "p"):
        text(tmp_path / "metadata.jsonl", json.dumps(row))
        (item,) = open_data(f"hf:{tmp_path}", 16)
        assert item.caption == caption and (item.depth == 2.5).all()  # in the steps that the table tells
        row.popitem()
