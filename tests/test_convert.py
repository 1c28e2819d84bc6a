"""convert: an export read back by our own readers is the run, whatever interrupts it; bad input writes nothing."""

import hashlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from planted_names import HOSTILE_NAMES
from rendered import document, rendered, write_run

from datasetdm_fast import audit, filter, open_run
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.config import EXPORT_FORMATS
from datasetdm_fast.convert import main
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Request, Sample, SemanticMap
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import mask_rle, number_classes
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.runs.exporting import conversion, export_folder, hf, wds
from datasetdm_fast.runs.exporting.classes import Classes, collect_classes, number_lookup, parse_renaming
from datasetdm_fast.runs.exporting.export_folder import read_export
from datasetdm_fast.runs.exporting.format import Linked, SampleView, class_map
from datasetdm_fast.runs.exporting.rings import editable_parts, rings
from datasetdm_fast.runs.exporting.sources import ExportSource, choose_labels
from datasetdm_fast.runs.exporting.voc import borders
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.corrections import Correction
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import Row, RowFile
from datasetdm_fast.training.readers import open_data

SIZE = 64
NUMBER = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of rendered samples and one of hard cases: a ring, two parts, one thing on another, a joint on the first
    pixel, and a picture without any label.
    """
    path = tmp_path_factory.mktemp("runs") / "run"
    with RunFolder(path, document(NUMBER + 2, SIZE)) as folder:
        folder.add([*(rendered(k, SIZE) for k in range(NUMBER)), hard_case(NUMBER), empty(NUMBER + 1)], {})
        finish_run(folder)
    return path


def hard_case(index: int) -> Sample:
    like = rendered(index, SIZE)
    masks = np.zeros((4, SIZE, SIZE), bool)
    masks[0, 4:30, 4:30] = True
    masks[0, 10:20, 12:22] = False
    masks[1, 40:50, 4:9] = masks[1, 40:50, 30:36] = True
    masks[2, 44:60, 28:60] = True
    masks[3, 0, 0] = True
    things = Instances(
        masks, np.array([0, 1, 2, 0]), np.array([0.9, 0.8, 0.7, 0.6], np.float32), like.annotations["instance"].classes
    )
    pose = like.annotations["pose"]
    points = np.zeros((1, len(pose.joints), 3), np.float32)
    points[..., :2] = np.linspace(0.5, 40.25, len(pose.joints))[:, None]
    points[..., 2] = 0.5
    seen = np.full((1, len(pose.joints)), 2)
    seen[0, -1] = 0
    points[0, -1] = 0
    person = Keypoints(points, seen, np.array([0.9], np.float32), pose.joints, pose.limbs)
    return Sample(like.request, like.image, {**like.annotations, "instance": things, "pose": person})


def empty(index: int) -> Sample:
    like, shape = rendered(index, SIZE), (SIZE, SIZE)
    labels = like.annotations
    return Sample(
        Request(index, "nothing", index),
        like.image,
        {
            "semantic": SemanticMap(
                np.full(shape, 255, np.uint8), np.ones(shape, np.float32), labels["semantic"].classes
            ),
            "instance": Instances(
                np.zeros((0, *shape), bool), np.zeros(0, np.int64), np.zeros(0, np.float32), labels["instance"].classes
            ),
            "depth": DepthMap(np.zeros(shape, np.float32), labels["depth"].max_depth),
            "pose": Keypoints(
                np.zeros((0, len(labels["pose"].joints), 3), np.float32),
                np.zeros((0, len(labels["pose"].joints)), np.int64),
                np.zeros(0, np.float32),
                labels["pose"].joints,
                labels["pose"].limbs,
            ),
            "open-vocabulary": SemanticMap(
                np.zeros(shape, np.uint8), np.ones(shape, np.float32), labels["open-vocabulary"].classes
            ),
        },
    )


def converted(run: Path, out: Path, *flags: str, code: int = 0) -> Path:
    assert main([str(run), "--out", str(out), "--quiet", *flags]) == code
    return out


def in_parts(run: Path, folder: Path, parts: dict[str, list[str]]) -> Path:
    """A copy of the run whose samples are assigned to these parts."""
    shutil.copytree(run, folder)
    shares = [100 / len(parts)] * len(parts)
    document = {"seed": 0, "by_source": True, "shares": shares, "parts": parts}
    (folder / "split.json").write_text(json.dumps(document))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_export_is_found_by_the_folder_of_all_formats(run, tmp_path):
    out = converted(run, tmp_path / "out", "--to", "coco,yolo-seg")
    for kind in ("coco", "yolo-seg"):
        found, wanted = (open_data(f"{kind}:{path}", SIZE) for path in (out, out / kind))
        assert [item.id for item in found] == [item.id for item in wanted] and len(wanted) == NUMBER + 2


@pytest.mark.parametrize("flags", [(), ("--polygons",)])
@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_coco_and_lvis_read_back_are_the_run(run, tmp_path, kind, flags):
    out = converted(run, tmp_path / "out", "--to", kind, *flags)
    source = open_data(f"{kind}:{out}/{kind}", SIZE)
    assert len(source) == NUMBER + 2
    for item, sample in zip(source, open_run(run), strict=True):
        assert (item.image == sample.image).all()
        truth = sample.instances
        names = [source.thing_classes[k] for k in item.mask_classes]
        assert names == [truth.classes[k] for k in truth.class_ids]
        assert (item.masks == truth.masks).all()
        if kind == "lvis":
            continue
        people = sample.keypoints
        seen = people.visibility > 0
        assert (item.keypoints[..., 2] == people.visibility).all()
        assert np.abs(item.keypoints[..., :2] - people.points[..., :2])[seen].max(initial=0) <= 1e-5


def test_lvis_has_polygons_alone_where_they_are_asked_for(run, tmp_path):
    out = converted(run, tmp_path / "out", "--to", "lvis,coco", "--polygons")
    files = out / "lvis/lvis_v1_train.json", out / "coco/annotations/instances_train2017.json"
    kinds = [{type(row["segmentation"]) for row in json.loads(file.read_text())["annotations"]} for file in files]
    assert kinds == [{list}, {list, dict}]  # the ring is run lengths in COCO's


def test_joints_and_limbs_of_coco_are_those_of_the_run(run, tmp_path):
    out = converted(run, tmp_path / "out", "--to", "coco")
    source, table = open_data(f"coco:{out}/coco", SIZE, tasks=["pose"]), open_run(run).document["labels"]["pose"]
    assert list(source.joints) == table["joints"] and [list(limb) for limb in source.limbs] == table["limbs"]


def test_pycocotools_reads_coco_and_finds_it_equal_to_itself(run, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    out = converted(run, tmp_path / "out", "--to", "coco") / "coco" / "annotations"
    for kind in ("instances", "person_keypoints"):
        truth = COCO(str(out / f"{kind}_train2017.json"))
        told = [
            {name: value for name, value in item.items() if name not in ("area", "id")}
            for item in truth.dataset["annotations"]
        ]
        found = truth.loadRes(told)
        for judge in ("keypoints",) if kind == "person_keypoints" else ("bbox", "segm"):
            evaluation = COCOeval(truth, found, judge)
            if judge == "keypoints":
                evaluation.params.kpt_oks_sigmas = np.full(len(told[0]["keypoints"]) // 3, 0.05)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == 1.0
    for item in COCO(str(out / "stuff_train2017.json")).dataset["annotations"]:
        assert item["area"] > 0


def test_panoptic_files_follow_the_rules_of_panopticapi(run, tmp_path):
    out = converted(run, tmp_path / "out", "--to", "coco") / "coco" / "annotations"
    told = json.loads((out / "panoptic_train2017.json").read_text())
    kinds = {category["id"]: category for category in told["categories"]}
    assert len(told["annotations"]) == len(told["images"]) == NUMBER + 2
    for item in told["annotations"]:
        pixels = np.asarray(Image.open(out / "panoptic_train2017" / item["file_name"])).astype(np.int64)
        numbers = pixels[..., 0] + 256 * pixels[..., 1] + 256**2 * pixels[..., 2]
        assert set(np.unique(numbers)) - {0} == {segment["id"] for segment in item["segments_info"]}
        for segment in item["segments_info"]:
            assert segment["area"] == np.count_nonzero(numbers == segment["id"]) and segment["category_id"] in kinds
            x, y, width, height = segment["bbox"]
            inside = numbers == segment["id"]
            assert inside[y : y + height, x : x + width].sum() == inside.sum()
            assert inside[y].any() and inside[:, x].any()


VOC_NAMES = (
    "--classes",
    "wall=,table=diningtable,ball=bottle,cube=chair,cone=boat,ring=bird,star=cat,tree=pottedplant",
)


@pytest.mark.parametrize("border", [0, 5])
def test_voc_read_back_is_the_run(run, tmp_path, border):
    flags = ("--to", "voc", "--image-format", "jpg", "--quality", "90", *VOC_NAMES, "--border", str(border))
    root = converted(run, tmp_path / "out", *flags) / "voc" / "VOCdevkit" / "VOC2012"
    source = open_data(f"voc:{root}", SIZE)
    new = dict(pair.split("=") for pair in VOC_NAMES[1].split(","))
    for item, sample in zip(source, open_run(run), strict=True):
        truth, things = sample.semantic, sample.instances
        names = [new.get(name, name) or "background" for name in truth.classes]
        wanted = np.array([*map(source.classes.index, names), *[255] * (256 - len(names))])[truth.labels]
        kinds = [source.classes.index(new.get(things.classes[k], things.classes[k])) for k in things.class_ids]
        objects = np.zeros(wanted.shape, np.uint8)
        for k in np.argsort(things.scores, kind="stable"):
            wanted[things.masks[k]], objects[things.masks[k]] = kinds[k], k + 1
        if border:
            wanted[borders(objects, border)] = 255
        assert (item.semantic == wanted).all()
        told = ElementTree.parse(root / "Annotations" / f"{sample.id}.xml").findall("object/truncated")
        edges = [mask[[0, -1]].any() or mask[:, [0, -1]].any() for mask in things.masks]
        assert [one.text for one in told] == [str(int(edge)) for edge in edges]
        if not border:
            alone = things.masks.sum(0) == 1
            assert [k + 1 for k in item.mask_classes] == kinds
            for mask, whole in zip(item.masks, things.masks, strict=True):
                assert (mask <= whole).all() and (mask == whole)[alone].all()


@pytest.mark.parametrize("parts", ["joined", "split"])
def test_yolo_seg_read_back_is_the_run(run, tmp_path, parts):
    out = converted(run, tmp_path / "out", "--to", "yolo-seg", "--parts", parts) / "yolo-seg"
    source = open_data(f"yolo-seg:{out}", SIZE)
    for item, sample in zip(source, open_run(run), strict=True):
        masks, truth = item.masks, sample.instances
        if parts == "split" and len(masks) > len(truth.masks):
            assert (masks.any(0) == truth.masks.any(0)).all()
            continue
        assert (masks == truth.masks).all()
        assert [source.thing_classes[k] for k in item.mask_classes] == [truth.classes[k] for k in truth.class_ids]


@pytest.mark.parametrize("kind", ["labelme", "cvat"])
def test_what_annotation_tools_open_read_back_is_the_run(run, tmp_path, kind):
    """Borders for a person to correct have few corners, at most a pixel away from the mask's."""
    from PIL import ImageFilter

    out = converted(run, tmp_path / "out", "--to", kind) / kind
    source = open_data(f"{kind}:{out}", SIZE, tasks=["instance"])
    for item, sample in zip(source, open_run(run), strict=True):
        truth = sample.instances
        assert [source.thing_classes[k] for k in item.mask_classes] == [truth.classes[k] for k in truth.class_ids]
        for mask, whole in zip(item.masks, truth.masks, strict=True):
            picture = Image.fromarray(whole.astype(np.uint8) * 255)
            inner, outer = (
                np.asarray(picture.filter(each(3))) > 0 for each in (ImageFilter.MinFilter, ImageFilter.MaxFilter)
            )
            assert not (mask & ~outer).any() and not (inner & ~mask).any()


def test_tasks_of_label_studio_that_nobody_has_corrected_are_refused_as_predictions(run, tmp_path):
    out = converted(run, tmp_path / "out", "--to", "label-studio") / "label-studio"
    with pytest.raises(Refused, match="no task of it has annotations, but predictions: "):
        open_data(f"label-studio:{out}", SIZE, tasks=["instance"])


@pytest.mark.parametrize(
    ("error", "told"), [(Refused("no PNG", ""), "(no PNG)"), (KeyError("counts"), "(KeyError: 'counts')")]
)
def test_a_sample_that_a_format_cannot_read_is_a_failed_check(error, told):
    def convert_sample(view, plan):
        raise error

    view = SimpleNamespace(stored=SimpleNamespace(id="00000007", run="runs/x"))
    with pytest.raises(GateFailed) as failed:
        conversion._convert_sample("coco", SimpleNamespace(convert_sample=convert_sample), view, None)
    assert failed.value.cause == f"runs/x: sample 00000007 is damaged {told}"


def test_a_border_of_voc_lies_half_inside():
    objects = np.zeros((40, 40), np.uint8)
    objects[10:30, 10:30] = 7
    ring = np.zeros((40, 40), bool)
    ring[7:33, 7:33], ring[12:28, 12:28] = True, False  # three pixels outside and two inside of 5
    assert np.array_equal(borders(objects, 5), ring)


def test_borders_for_a_person_have_few_corners():
    down, across = np.mgrid[:100, :100]
    disc = (down - 50) ** 2 + (across - 50) ** 2 < 40**2
    (line,) = editable_parts(disc & ~((down - 50) ** 2 + (across - 50) ** 2 < 10**2))
    assert len(rings(disc)[0]) > 100 and len(line) < 60
    corner = np.zeros((9, 9), bool)
    corner[2:8, 3], corner[7, 3:8] = True, True  # an L of one pixel's width stays as it is
    assert editable_parts(corner)[0].tolist() == rings(corner)[0].tolist()


def test_boxes_and_joints_of_yolo_are_those_of_the_run(run, tmp_path):
    import yaml

    out = converted(run, tmp_path / "out", "--to", "yolo-detect,yolo-pose")
    told = yaml.safe_load((out / "yolo-pose" / "data.yaml").read_text())
    joints = open_run(run)[0].keypoints.joints
    assert told["names"] == {0: "person"} and told["kpt_shape"] == [len(joints), 3]
    assert [joints[k] for k in told["flip_idx"]] == [
        name.replace("left", "#").replace("right", "left").replace("#", "right") for name in joints
    ]
    names = yaml.safe_load((out / "yolo-detect" / "data.yaml").read_text())["names"]
    for sample in open_run(run):
        rows = np.array((out / f"yolo-detect/labels/train/{sample.id}.txt").read_text().split(), float).reshape(-1, 5)
        things = sample.instances
        assert [names[int(row[0])] for row in rows] == [things.classes[k] for k in things.class_ids]
        for (_, x, y, width, height), mask in zip(rows * SIZE, things.masks, strict=True):
            down, across = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [across[0], down[0], across[-1] + 1, down[-1] + 1]
            assert np.allclose([x - width / 2, y - height / 2, x + width / 2, y + height / 2], box, atol=1e-6)
        people = np.array((out / f"yolo-pose/labels/train/{sample.id}.txt").read_text().split(), float)
        found = people.reshape(-1, 5 + 3 * len(joints))[:, 5:].reshape(-1, len(joints), 3)
        seen = sample.keypoints.visibility > 0
        assert (found[..., 2] == sample.keypoints.visibility).all()
        assert np.abs(found[..., :2] * SIZE - sample.keypoints.points[..., :2])[seen].max(initial=0) < 1e-5


@pytest.mark.parametrize("kind, steps", [("nyu", 1000), ("kitti", 256)])
def test_depth_read_back_is_the_run_to_half_a_unit(run, tmp_path, kind, steps):
    out = converted(run, tmp_path / "out", "--to", kind) / kind
    source = open_data(f"{kind}:{out}", SIZE)
    for item, sample in zip(source, open_run(run), strict=True):
        seen = sample.depth.metres <= source.max_depth
        assert np.abs(item.depth - sample.depth.metres)[seen].max(initial=0) <= 0.5 / steps + 1e-6


def test_far_depth_is_kept_where_16_bits_hold_it_else_unknown(tmp_path):
    run, described = tmp_path / "run", document(1, SIZE)
    described["labels"]["depth"] = {"max_depth": 80.0, "unit": "1/256 metre"}
    ramp = np.linspace(1, 80, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    like = rendered(0, SIZE)
    with RunFolder(run, described) as folder:
        labels = {**like.annotations, "depth": DepthMap(ramp, 80.0)}
        folder.add([Sample(like.request, like.image, labels)], {})
        finish_run(folder)
    out = converted(run, tmp_path / "out", "--to", "nyu,kitti")
    assert np.abs(open_data(f"kitti:{out}/kitti", SIZE)[0].depth - ramp).max() <= 0.5 / 256 + 1 / 512 + 1e-5
    (path,) = (out / "nyu").rglob("sync_depth*.png")
    pixels = np.asarray(Image.open(path)).astype(int)
    assert (pixels[ramp > 65.54] == 0).all() and (pixels[ramp < 65.53] > 0).all()


CITY_NAMES = "wall=road,table=sidewalk,ball=car,cube=truck,cone=bus,ring=train,star=motorcycle,tree=bicycle"


def test_cityscapes_read_back_is_the_run(run, tmp_path, capsys):
    out = converted(run, tmp_path / "out", "--to", "cityscapes", "--classes", CITY_NAMES) / "cityscapes"
    source = open_data(f"cityscapes:{out}", SIZE)
    new = dict(pair.split("=") for pair in CITY_NAMES.split(","))
    for item, sample in zip(source, open_run(run), strict=True):
        things = sample.instances
        names = [source.thing_classes[k] for k in item.mask_classes]
        assert sorted(names) == sorted(new.get(things.classes[k], things.classes[k]) for k in things.class_ids)
        alone = things.masks.sum(0) == 1
        for mask, name in zip(item.masks, names, strict=True):
            assert any(
                (mask <= whole).all() and (mask == whole)[alone].all()
                for whole, k in zip(things.masks, things.class_ids)
                if new.get(things.classes[k], things.classes[k]) == name
            )
        outside = ~things.masks.any(0) & (sample.semantic.labels != 255)
        wanted = np.array([source.classes.index(new.get(name, name)) for name in sample.semantic.classes] + [255] * 247)
        assert (item.semantic == wanted[sample.semantic.labels])[outside].all()
    converted(run, tmp_path / "no", "--to", "cityscapes", "--classes", "person=x,wall=y", code=2)
    assert "none of the classes is one of its own" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_polygons_of_cityscapes_painted_in_their_order_are_its_label_ids(run, tmp_path):
    from datasetdm_fast.runs.exporting.cityscapes import WORDS

    out = converted(run, tmp_path / "out", "--to", "cityscapes", "--classes", CITY_NAMES) / "cityscapes"
    groups, wrong = 0, []
    for path in sorted(out.rglob("*_polygons.json")):
        label_ids = np.asarray(Image.open(str(path).replace("_polygons.json", "_labelIds.png")))
        told, painted = json.loads(path.read_text()), Image.new("L", label_ids.shape[::-1])
        assert [told["imgHeight"], told["imgWidth"]] == list(label_ids.shape)
        for shape in told["objects"]:  # as json2labelImg of cityscapesScripts paints them
            name = shape["label"].removesuffix("group")
            groups += name != shape["label"]
            ImageDraw.Draw(painted).polygon(list(map(tuple, shape["polygon"])), fill=WORDS[name][1])
        wrong.append(int((np.asarray(painted) != label_ids).sum()))
    assert groups and wrong == [0] * (NUMBER + 2)


def test_areas_with_holes_and_pixels_that_touch_at_corners_are_painted_exactly():
    from datasetdm_fast.runs.exporting import cityscapes, rings

    random = np.random.default_rng(5)
    for sides in [(1, 1), (1, 2), (3, 1), *random.integers(2, 14, (300, 2)).tolist()]:
        area = random.random(sides) < random.choice([0.3, 0.6, 0.9])
        painted = Image.new("1", sides[::-1])
        for part in rings.group_parts(rings.rings(area)):
            line = cityscapes._paintable_line(area, part)
            ImageDraw.Draw(painted).polygon([*map(tuple, line.tolist())], fill=1)
        assert np.array_equal(np.asarray(painted), area)


def as_run(told, image, semantic, depth, sample) -> None:
    """Checks what formats tell of a sample against the run."""
    assert (np.asarray(image) == sample.image).all() and told["prompt"] == sample.prompt
    shown = np.asarray(semantic)
    assert (np.where(shown == 255, 255, shown - 1) == sample.semantic.labels).all()
    assert np.abs(np.asarray(depth) / 1000 - sample.depth.metres).max() < 1e-5
    truth = sample.instances
    things = told["objects"]
    assert [k - 3 for k in things["category"]] == truth.class_ids.tolist()
    masks = [mask_rle.decode({"size": [SIZE, SIZE], "counts": counts}) for counts in things["rle"]]
    assert len(masks) == len(truth.masks) and all((a == b).all() for a, b in zip(masks, truth.masks))


def test_shards_of_wds_hold_the_run_and_have_the_same_bytes_each_time(run, tmp_path):
    flags = ("--to", "wds", "--shard", "4")
    out = converted(run, tmp_path / "out", *flags) / "wds"
    assert contents(out) == contents(converted(run, tmp_path / "again", *flags) / "wds")
    samples, found = list(open_run(run)), 0
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as shard:
            assert all(member.mtime == 0 and member.uid == 0 and not member.uname for member in shard)
            parts = {member.name: shard.extractfile(member).read() for member in shard}
        for name in sorted({name.partition(".")[0] for name in parts}):
            pictures = [Image.open(io.BytesIO(parts[f"{name}.{end}"])) for end in ("png", "semantic.png", "depth.png")]
            as_run(json.loads(parts[f"{name}.json"]), *pictures, samples[found])
            found += 1
    assert found == len(samples)


def test_the_image_folder_holds_the_run(run, tmp_path):
    out = converted(run, tmp_path / "out", "--to", "hf") / "hf" / "train"
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    for line, sample in zip(lines, open_run(run), strict=True):
        pictures = [Image.open(out / line[f"{name}_file_name"]) for name in ("image", "semantic", "depth")]
        as_run(line, *pictures, sample)


def test_parquet_holds_the_run_and_its_features(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    out = converted(run, tmp_path / "out", "--to", "hf-parquet", "--shard", "6") / "hf-parquet" / "data"
    files = sorted(out.iterdir())
    assert [path.name for path in files] == [f"train-{k:05d}-of-00002.parquet" for k in range(2)]
    tables = [parquet.read_table(path) for path in files]
    features = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"} and set(features) == set(tables[0].column_names)
    rows = [row for table in tables for row in table.to_pylist()]
    for row, sample in zip(rows, open_run(run), strict=True):
        as_run(row, *(Image.open(io.BytesIO(row[name]["bytes"])) for name in ("image", "semantic", "depth")), sample)


def test_large_pictures_are_parted_into_row_groups(run, tmp_path, monkeypatch):
    """A column of a row group, which is in memory at a time, cannot hold 2 GiB."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    (usual,) = (converted(run, tmp_path / "usual", "--to", "hf-parquet") / "hf-parquet/data").iterdir()
    sizes = [len(row["image"]["bytes"]) for row in parquet.read_table(usual).to_pylist()]
    monkeypatch.setattr(hf, "GROUP_BYTES", max(sizes) + 1)
    (parted,) = (converted(run, tmp_path / "parted", "--to", "hf-parquet") / "hf-parquet/data").iterdir()
    assert parquet.ParquetFile(usual).num_row_groups == 1 < parquet.ParquetFile(parted).num_row_groups
    assert parquet.read_table(parted).equals(parquet.read_table(usual))


def test_marks_of_a_label_map_may_stand_in_names_of_classes(run, tmp_path):
    flags = ("--to", "voc", "--classes", "ball=#1 ball,cube=cube: red")
    source = open_data(f"voc:{converted(run, tmp_path / 'out', *flags)}/voc", SIZE, tasks=["instance"])
    assert {"1 ball", "cube red", "cone"} < set(source.thing_classes)
    shown = [sorted(source.thing_classes[k] for k in item.mask_classes) for item in source]
    new = {"ball": "1 ball", "cube": "cube red"}
    for names, sample in zip(shown[:NUMBER], open_run(run)):
        things = sample.instances
        assert names == sorted(new.get(things.classes[k], things.classes[k]) for k in things.class_ids)


@pytest.mark.parametrize("combine", [(), ("semantic within instance:ball",), ("instance within semantic:table",)])
def test_what_a_run_ignores_is_ignored_under_things_too(tmp_path, combine):
    """Unless 255 is what lies outside of another label: the demo's map has no class background."""
    like = rendered(0, SIZE)
    truth, things = like.annotations["semantic"], like.annotations["instance"]
    labels = truth.labels.copy()
    labels[:, : SIZE // 2] = 255
    assert things.masks[:, labels == 255].any() and things.masks[:, labels != 255].any()
    with RunFolder(tmp_path / "run", document(1, SIZE, combine=combine)) as folder:
        folder.add([replace(like, annotations=like.annotations | {"semantic": replace(truth, labels=labels)})], {})
        finish_run(folder)
    out = converted(tmp_path / "run", tmp_path / "out", "--to", "coco,voc,cityscapes", "--classes", CITY_NAMES)
    voc, city = out / "voc/VOCdevkit/VOC2012", out / "cityscapes/gtFine/train/synthetic"
    is_open = combine and combine[0].startswith("semantic")
    unsaid = (labels == 255) & ~things.masks.any(0) if is_open else labels == 255
    objects, classes = (
        np.asarray(Image.open(voc / name / "00000000.png")) for name in ("SegmentationObject", "SegmentationClass")
    )
    assert ((classes == 255) == unsaid).all() and ((objects == 255) == (False if is_open else unsaid)).all()
    panoptic = np.asarray(Image.open(out / "coco/annotations/panoptic_train2017/00000000.png"))
    assert (panoptic.any(2) == ~unsaid).all()
    label_ids, numbers = (
        np.asarray(Image.open(city / f"synthetic_000000_000000_gtFine_{name}.png"))
        for name in ("labelIds", "instanceIds")
    )
    assert not label_ids[unsaid].any() and not numbers[unsaid].any()
    painted = Image.new("L", (SIZE, SIZE))
    from datasetdm_fast.runs.exporting.cityscapes import WORDS

    for shape in json.loads((city / "synthetic_000000_000000_gtFine_polygons.json").read_text())["objects"]:
        name = shape["label"].removesuffix("group")
        ImageDraw.Draw(painted).polygon(list(map(tuple, shape["polygon"])), fill=WORDS[name][1])
    assert (np.asarray(painted) == label_ids).mean() > 0.99
    coco = json.loads((out / "coco/annotations/instances_train2017.json").read_text())
    assert sum(row["area"] for row in coco["annotations"]) == things.masks.sum()


def test_objects_that_8_bits_cannot_tell_are_missing_and_not_ignored(tmp_path):
    like = rendered(0, SIZE)
    masks = np.zeros((260, SIZE, SIZE), bool)
    masks.reshape(260, -1)[np.arange(260), np.arange(260) * 4] = True
    things = Instances(
        masks, np.zeros(260, np.int64), np.full(260, 0.9, np.float32), like.annotations["instance"].classes
    )
    with RunFolder(tmp_path / "run", document(1, SIZE)) as folder:
        folder.add([replace(like, annotations=like.annotations | {"instance": things})], {})
        finish_run(folder)
    out = converted(tmp_path / "run", tmp_path / "out", "--to", "voc") / "voc/VOCdevkit/VOC2012/SegmentationObject"
    numbers, pixels = np.unique(np.asarray(Image.open(out / "00000000.png")), return_counts=True)
    assert numbers.tolist() == list(range(255)) and (pixels[1:] == 1).all()


def test_the_config_of_mmseg_names_what_is_there(run, tmp_path):
    out = converted(run, tmp_path / "out", "--to", "mmseg") / "mmseg"
    found = runpy.run_path(str(out / "dataset.py"))
    names = ("background", *open_run(run)[0].semantic.classes)
    assert found["metainfo"]["classes"] == names and found["num_classes"] == len(names)
    for folder in found["datasets"]["train"]["data_prefix"].values():
        assert len(list((out / folder).iterdir())) == NUMBER + 2
    labels = np.asarray(Image.open(out / "annotations" / "train" / "00000000.png"))
    assert [names[k] for k in np.unique(labels)] == [names[k + 1] for k in np.unique(open_run(run)[0].semantic.labels)]


@pytest.mark.parametrize("kind", ["hf", "hf-parquet"])
def test_our_reader_of_hf_takes_both_kinds(run, tmp_path, kind):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    source = open_data(f"hf:{converted(run, tmp_path / 'out', '--to', kind)}/{kind}", SIZE)
    own = open_data(f"run:{run}[all]", SIZE)
    assert source.thing_classes == own.thing_classes and set(source.classes) > set(source.thing_classes)
    for item, sample in zip(source, open_run(run), strict=True):
        assert item.caption == sample.prompt and (item.image == sample.image).all()
        assert (np.where(item.semantic == 255, 255, item.semantic - 1) == sample.semantic.labels).all()
        assert np.abs(item.depth - sample.depth.metres).max() < 1e-6


def fits(feature: dict, value) -> bool:
    """Whether a value is of the type that the head of a README.md tells."""
    if "struct" in feature:
        return {part["name"] for part in feature["struct"]} == {*value} and all(
            fits(part, value[part["name"]]) for part in feature["struct"]
        )
    if "list" in feature:
        return isinstance(value, list) and all(fits(feature["list"], each) for each in value)
    if isinstance(feature["dtype"], dict):
        return str(value) in feature["dtype"]["class_label"]["names"]
    types = {"string": str, "int32": int, "int64": int, "float64": float, "image": Image.Image}
    return isinstance(value, types[feature["dtype"]])


@pytest.mark.parametrize("form", ["png", "jpg"])
def test_read_me_of_wds_tells_load_dataset_the_shards_of_each_split_and_the_types_of_all(run, tmp_path, form):
    """Also where the samples of a split, or the first five of all, show no person and no instance."""
    names = [sample.id for sample in open_run(run)]
    parts = {"train-1": names[-1:], "train": names[:-1]}  # of which the last shows nothing
    flags = ("--to", "wds", "--shard", "5", "--image-format", form)
    out = converted(in_parts(run, tmp_path / "run", parts), tmp_path / "out", *flags) / "wds"
    head = yaml.safe_load((out / "README.md").read_text().split("\n---\n")[0])
    types, (config,) = {"struct": head["dataset_info"]["features"]}, head["configs"]
    record = {part["name"]: part for part in types["struct"]}["json"]["struct"]
    category = {part["name"]: part for part in record}["objects"]["struct"][0]
    numbers = {"class_label": {"names": json.loads((out / "id2label.json").read_text())}}
    assert category == {"name": "category", "list": {"dtype": numbers}}
    patterns = {each["split"]: each["path"] for each in config["data_files"]}
    assert patterns.keys() == {"train", "train_1"}
    for split, pattern in patterns.items():
        shards = sorted(out.glob(pattern))
        assert shards == sorted(out.glob(f"{split.replace('_', '-')}-0*.tar")) != []
        for path in shards:
            samples: dict[str, dict] = {}
            with tarfile.open(path) as shard:
                for member in shard:
                    key, _, field = member.name.partition(".")
                    data = shard.extractfile(member).read()
                    value = json.loads(data) if field == "json" else Image.open(io.BytesIO(data))
                    samples.setdefault(key, {"__key__": key, "__url__": str(path)})[field] = value
            assert samples and all(fits(types, row) for row in samples.values())


def test_read_me_of_wds_tells_exports_of_other_samples_or_settings_apart(tmp_path):
    """`datasets` takes what it has cached of a folder of this name for any other whose README.md has the same head."""
    write_run(tmp_path / "a", 2, SIZE)
    write_run(tmp_path / "b", 2, SIZE, ["a red ball", "a blue cube"])

    def read_me(run: str, *flags: str) -> bytes:
        out = converted(tmp_path / run, tmp_path / f"{run}_{len(flags)}", "--to", "wds", *flags)
        return (out / "wds" / "README.md").read_bytes()

    first = read_me("a")
    assert len({first, read_me("b"), read_me("a", "--least-score", "0.7")}) == 3
    shutil.rmtree(tmp_path / "a_0")
    assert read_me("a") == first


def test_convert_to_hf_ends_with_the_splits_that_load_dataset_refuses(run, tmp_path, capsys):
    names = [sample.id for sample in open_run(run)]
    split = in_parts(run, tmp_path / "run", {"train": names[:-1], "val": names[-1:]})  # the last shows nothing
    assert main([str(split), "--out", str(tmp_path / "out"), "--to", "hf,hf-parquet"]) == 0
    told = capsys.readouterr().err
    assert all(told.count(f"hf: val without any {name}; load_dataset refuses") == 1 for name in ("objects", "people"))


def test_splits_of_parquet_are_called_as_datasets_calls_them_and_read_by_the_name_they_had(run, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    names = [sample.id for sample in open_run(run)]
    split = in_parts(run, tmp_path / "run", {"my-part": names[:2], "val": names[2:]})
    out = converted(split, tmp_path / "out", "--to", "hf-parquet") / "hf-parquet"
    files = sorted(path.name for path in (out / "data").iterdir())
    assert files == ["my_part-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]
    assert [len(open_data(f"hf:{out}[{name}]", SIZE)) for name in ("my-part", "val")] == [2, len(names) - 2]


@pytest.mark.parametrize(("first", "second", "name"), [("a-b", "a_b", "a_b"), ("val", "validation", "validation")])
def test_splits_of_one_name_in_datasets_do_not_overwrite_one_another(run, tmp_path, capsys, first, second, name):
    names = [sample.id for sample in open_run(run)]
    split = in_parts(run, tmp_path / "run", {first: names[:3], second: names[3:]})
    for format in ("hf-parquet", "wds"):
        out = converted(split, tmp_path / "out", "--to", format, code=2)
        cause = f"--to {format}: the splits {first} and {second} would both be {name} for the library datasets"
        assert cause in capsys.readouterr().err and not out.exists()


def test_marks_that_end_lines_elsewhere_may_stand_in_a_prompt(tmp_path):
    prompts = ["a red\u2028ball", "a cube\x85on a table"]
    write_run(tmp_path / "run", 2, SIZE, prompts)
    out = converted(tmp_path / "run", tmp_path / "out", "--to", "hf")
    assert [item.caption for item in open_data(f"hf:{out}/hf", SIZE)] == prompts


def test_only_samples_of_a_condition_or_a_filter_are_converted(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, 6, SIZE)
    where = ("--to", "yolo-detect", "--where", "score >= 0.6 and duplicate == 0")
    converted(run, out, *where, code=2)
    assert "datasetdm_fast.filter" in capsys.readouterr().err and not out.exists()
    assert filter.main([str(run), "--where", where[-1], "--quiet"]) == 0
    kept = {sample.id for sample in open_run(run, kept=True)}
    assert 0 < len(kept) <= 6
    for flags in (where, ("--to", "yolo-detect", "--kept")):
        found = converted(run, tmp_path / flags[2].strip("-"), *flags) / "yolo-detect" / "images" / "train"
        assert {path.stem for path in found.iterdir()} == kept


def test_instances_called_background_are_left_out_as_that_class_of_a_map_is(tmp_path):
    """A decoder has such instances where a data set in COCO's form has a category of that name."""
    run, described = tmp_path / "run", document(1, SIZE)
    names = described["labels"]["instance"]["classes"]
    names.append("background")
    described |= number_classes(described["labels"])
    sample = hard_case(0)
    things = replace(sample.annotations["instance"], class_ids=np.array([0, 7, 2, 7]), classes=tuple(names))
    with RunFolder(run, described) as folder:
        folder.add([replace(sample, annotations={**sample.annotations, "instance": things})], {})
        finish_run(folder)
    assert names[7] == "background"
    out = converted(run, tmp_path / "out", "--to", "coco,yolo-seg,voc")
    (item,) = open_data(f"coco:{out}/coco", SIZE)
    assert len(item.masks) == 2 and sorted(mask.sum() for mask in item.masks) == sorted(
        mask.sum() for mask in things.masks[[0, 2]]
    )
    assert len((out / "yolo-seg" / "labels" / "train" / "00000000.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "count", "facts", "said"),
    [
        ("mmseg", 254, {}, ""),
        ("mmseg", 255, {}, "255 classes, its label maps hold 254"),
        ("coco", 255, {}, ""),
        ("voc", 2, {"tasks": {"instance"}}, ""),
        (
            "voc",
            2,
            {"tasks": {"depth", "pose"}},
            "it needs labels for semantic or instance, there are some for depth, pose",
        ),
        ("voc", 2, {"form": "png"}, "--image-format png: voc has jpg files"),
        ("coco", 2, {"form": "jpg"}, ""),
        ("cityscapes", 2, {}, r"none of the classes is one of its own \(class 0, class 1\)"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_a_sample(name, count, facts, said):
    names = tuple(f"class {k}" for k in range(count))
    plan = SimpleNamespace(
        classes=Classes(names, names, ()),
        tasks=facts.get("tasks", {"semantic"}),
        pictures=SimpleNamespace(image_format=facts.get("form", "same")),
    )
    with pytest.raises(Refused, match=said) if said else nullcontext():
        conversion.open_format(name).check(name, plan)


def test_a_row_of_parquet_names_the_form_of_its_picture(tmp_path):
    stored = SimpleNamespace(seed=7)
    sample = SimpleNamespace(name="a", prompt="a ball", stored=stored, width=4, height=2, picture=lambda forms: form)
    for form in (("jpg", b"x"), ("png", b"y")):
        row = hf._row(sample, SimpleNamespace(tasks=set(), classes=Classes((), (), ())))
        assert row["image"] == {"bytes": form[1], "path": f"a.{form[0]}"}
        assert (row["id"], row["prompt"], row["seed"], row["width"], row["height"]) == ("a", "a ball", 7, 4, 2)


def test_an_export_knows_its_samples_by_split_and_place_and_a_file_that_two_have_written(tmp_path):
    description = {"settings": {}, "runs": [], "samples": 3, "splits": {}, "format": 1}
    file = storage.StoredFile("0" * 64, 1)
    with export_folder.ExportFolder(tmp_path / "out", description, is_copied=True) as opened:
        rows = ((5, "train", "a/x"), (2, "train", "a/y"), (3, "val", "a/z"))
        opened.commit([export_folder.done_row(k, split, {"a": {"k": k}}, {name: file}) for k, split, name in rows])
        assert opened.numbers() == {2, 3, 5} and opened.numbers_of("train", 0, 9) == [2, 5]
        assert opened.numbers_of("train", 1, 2) == [5] and opened.numbers_of("train", 0, 1) == [2]
        assert list(opened.entries("a", "train")) == [{"k": 2}, {"k": 5}]
        assert opened.find_repeated(["a/all"]) is None and opened.find_repeated(["a/all", "a/z"]) == "a/z"
        opened.commit([export_folder.done_row(7, "val", {}, {"a/x": file})])
        assert opened.find_repeated([]) == "a/x"


FILES = json.dumps([["a/x", "0", 3]])
NOTE = json.dumps({"done": [[1, "train", "{}", FILES]], "shared": [["a/all", "0", 2]]})


@pytest.mark.parametrize(
    ("note", "sizes", "done"),
    [
        (NOTE, (3, 2), {1}),
        (NOTE, (4, 2), set()),
        (NOTE, (3, 1), set()),
        ("", (3, 2), set()),
        ('{"done": [', (3, 2), set()),
        ("[]", (3, 2), set()),
        ('{"done": 5, "shared": []}', (3, 2), set()),
        ('{"done": [[1]], "shared": []}', (3, 2), set()),
        ('{"shared": []}', (3, 2), set()),
    ],
)
def test_a_note_of_another_process_counts_where_its_files_are_there(tmp_path, note, sizes, done):
    description = {"settings": {}, "runs": [], "samples": 3, "splits": {}, "format": 1}
    with export_folder.ExportFolder(tmp_path / "out", description, is_copied=True) as opened:
        opened.__class__ = export_folder.StoredExport
        opened._read_note(note.encode(), dict(zip(("a/x", "a/all"), sizes)))
        assert opened.numbers() == done


def test_names_of_files_may_have_spaces_in_the_list_of_digests(tmp_path):
    (tmp_path / "SHA256SUMS").write_text("12  coco/a  b \n34  c\n")
    assert list(export_folder.read_sums(tmp_path)) == [("coco/a  b ", "12"), ("c", "34")]


def test_a_format_of_a_package_may_link_files_of_the_run(tmp_path):
    linked = Linked(tmp_path / "a.png", storage.StoredFile("0" * 64, 1))
    view = SimpleNamespace(stored=SimpleNamespace(id="00000000"))
    for files, entry, is_taken in (
        ({"a.png": linked, "b": b"x"}, {"k": 1}, True),
        ({"a.png": "x"}, {}, False),
        ({"a.png": b"x"}, {"k": {1}}, False),
        ({"../a.png": b"x"}, {}, False),
    ):
        made = SimpleNamespace(convert_sample=lambda view, plan, made=(files, entry): made)
        with nullcontext() if is_taken else pytest.raises((TypeError, Refused, ValueError)):
            assert conversion.convert_by_package("coco", made, view, None) == (files, entry)


def test_a_run_that_is_not_finished_is_told_before_its_samples_are_converted():
    made = object.__new__(conversion.Conversion)
    voc = SimpleNamespace(unknown_classes=lambda plan: ["mug", "jug"])
    made.plan, made.corrected = None, 2
    made.formats = {"coco": SimpleNamespace(unknown_classes=lambda plan: []), "voc": voc}
    for is_complete in (True, False):

        class Samples(list):
            path = "run"

        samples = Samples("1234567")
        samples.is_complete = is_complete
        made.source = SimpleNamespace(run=samples)
        *told, last = made.notes()
        unfinished = [] if is_complete else ["run: not finished; converted so far: 7 samples"]
        assert told == ["run: corrections of 2 samples are applied", *unfinished]
        assert last.startswith("voc: ") and "mug, jug" in last


def test_a_file_of_chunks_ends_with_the_last_of_them():
    assert list(conversion._read_chunks("coco", "a", [b"x", b"", b"y"])) == [b"x", b"", b"y"]
    assert list(conversion._read_chunks("coco", "a", b"whole")) == [b"whole"]


@pytest.mark.parametrize("sides", [(2, 4), (4, 2)])
def test_without_a_map_a_sample_ignores_the_regions_that_were_corrected(sides):
    view = object.__new__(SampleView)
    view.plan, (view.height, view.width) = SimpleNamespace(labels={}, is_partial=False), sides
    for correction, count in ((None, 0), (Correction(ignored=((0, 1, 1, 2),)), 1)):
        view._correction = correction
        assert view.ignored.shape == sides and view.ignored.sum() == count and view.ignored[1, 0] == bool(count)


def test_three_hundred_classes_are_for_formats_without_label_maps(tmp_path, capsys):
    run, described = tmp_path / "run", document(1, SIZE)
    names = [f"class {k}" for k in range(300)]
    described["labels"]["instance"]["classes"] = names
    described |= number_classes(described["labels"])
    with RunFolder(run, described) as folder:
        folder.add([rendered(0, SIZE)], {})
        finish_run(folder)
    out = converted(run, tmp_path / "out", "--to", "coco,yolo-seg")
    assert len(open_data(f"coco:{out}/coco", SIZE).thing_classes) == 300
    for flags in (("--to", "voc"), ("--to", "cityscapes", "--classes", "class 7=car")):
        converted(run, tmp_path / "no", *flags, code=2)
        assert "its label maps hold 254" in capsys.readouterr().err


def test_files_that_need_no_change_are_links_and_copies_have_the_same_bytes(run, tmp_path):
    linked = converted(run, tmp_path / "linked", "--to", "coco")
    copied = converted(run, tmp_path / "copied", "--to", "coco", "--copy")
    image = "coco/images/train2017/00000003.png"
    assert (linked / image).samefile(run / "images" / "00000003.png")
    assert not (copied / image).samefile(run / "images" / "00000003.png")
    assert contents(linked) == contents(copied)


def test_a_command_that_enters_the_run_leaves_alone_what_an_export_is_being_written_to(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write_run(run, 4, SIZE)
    renames, call = [], storage.syscall

    def entered(name, *arguments):
        if name == "rename" and "exports/coco" in str(arguments[-1]) and not renames:
            renames.append(arguments)
            assert filter.main([str(run), "--quiet"]) == 0
        return call(name, *arguments)

    monkeypatch.setattr(storage, "syscall", entered)
    assert main([str(run), "--to", "coco", "--copy", "--quiet"]) == 0 and renames
    assert audit.main([str(run)]) == 0


def test_the_page_of_formats_names_folders_that_an_export_has(run, tmp_path):
    kinds = [kind for kind in EXPORT_FORMATS if kind not in ("cityscapes", "hf-parquet")]
    out = converted(run, tmp_path / "out", "--to", ",".join(kinds))
    there = ["/".join(path.split("/")[1:]) for path in contents(out)]
    page = (Path(__file__).parents[1] / "docs/formats.md").read_text()
    named = [
        path.replace("SPLIT", "train") for path in re.findall(r"`((?:images|labels|annotations|\w+/\w+)/SPLIT)`", page)
    ]
    assert {"images/train", "labels/train"} <= {*named}
    assert all(any(path.startswith(f"{folder}/") for path in there) for folder in named)


def test_the_sums_are_those_of_every_file_and_there_before_an_export_is_complete(run, tmp_path, monkeypatch):
    written, publish = [], storage.publish
    monkeypatch.setattr(storage, "publish", lambda files: written.extend(path.name for path in files) or publish(files))
    out = converted(run, tmp_path / "out", "--to", "coco")
    described, sums = json.loads((out / "export.json").read_text()), (out / "SHA256SUMS").read_bytes()
    assert written[-2:] == ["SHA256SUMS", "export.json"] and described["sums"] == hashlib.sha256(sums).hexdigest()
    lines = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    there = {name: hashlib.sha256(content).hexdigest() for name, content in contents(out).items()}
    assert lines == {name: digest for name, digest in there.items() if name not in ("SHA256SUMS", "export.json")}


def kill_after(count: int) -> None:
    """Lets this process die at a later access to the disk, as by kill -9."""
    calls, real = iter(range(10**9)), storage.syscall

    def dying(name, call, *arguments):
        if name in ("rename", "link", "write") and next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(name, call, *arguments)

    storage.syscall = dying


def test_a_killed_conversion_ends_with_the_same_bytes(run, tmp_path):
    flags = ("--to", "coco", "--threads", "2")
    whole = contents(converted(run, tmp_path / "whole", *flags))
    for after in (1, 3, 9, 20, 30, 34, 37, 40, 42):
        out = tmp_path / f"killed-{after}"
        if not (child := os.fork()):
            kill_after(after)
            main([str(run), "--out", str(out), "--quiet", *flags])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or contents(out) == whole
        assert contents(converted(run, out, *flags)) == whole


def test_a_run_folder_that_was_moved_keeps_its_export(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "before")
    converted(tmp_path / "before", tmp_path / "before" / "exports", "--to", "coco")
    (tmp_path / "before").rename(tmp_path / "after")
    capsys.readouterr()
    assert main([str(tmp_path / "after"), "--to", "coco", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "nothing to do" in err and json.loads(out)["made"] == 0


@pytest.mark.parametrize("resize, code", [(0, 0), (256, 2)])
def test_an_export_of_an_earlier_version_goes_on_if_its_pictures_kept_their_size(run, tmp_path, capsys, resize, code):
    out = converted(run, tmp_path / "out", "--to", "coco")
    document = json.loads((out / "export.json").read_text())
    document["settings"]["resize"] = resize
    del document["settings"]["part"]  # which 0.2.0 did not have
    (out / "export.json").write_text(json.dumps(document))
    converted(run, out, "--to", "coco", code=code)
    assert ("settings.resize" in capsys.readouterr().err) == bool(code)


def test_an_export_that_has_lost_a_file_is_not_called_complete(run, tmp_path, capsys):
    out = converted(run, tmp_path / "out", "--to", "coco")
    (out / "coco" / "annotations" / "instances_train2017.json").unlink()
    assert main([str(run), "--to", "coco", "--out", str(out)]) == 4
    assert "instances_train2017.json is not there" in capsys.readouterr().err


def test_an_export_stopped_before_its_shared_files_says_that_it_is_not_complete(run, tmp_path, capsys, monkeypatch):
    out, is_stopping = tmp_path / "out", Interruption.is_stopping
    asked = iter([False, False])
    monkeypatch.setattr(Interruption, "is_stopping", lambda self: next(asked, True))
    monkeypatch.setattr(Interruption, "exit_code", 130)
    assert main([str(run), "--to", "coco", "--out", str(out), "--threads", "1"]) == 130
    assert f"{out}: not complete; resume with: " in capsys.readouterr().err
    monkeypatch.setattr(Interruption, "exit_code", 0)
    monkeypatch.setattr(Interruption, "is_stopping", is_stopping)
    assert main([str(run), "--to", "coco", "--out", str(out), "--threads", "1"]) == 0
    assert "nothing to do" not in capsys.readouterr().err


def test_a_complete_export_is_left_alone_and_another_is_never_overwritten(run, tmp_path, capsys):
    out = converted(run, tmp_path / "out", "--to", "coco")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    converted(run, out, "--to", "coco")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    converted(run, out, "--to", "coco", "--polygons", code=2)
    assert "holds an export with other settings (settings.polygons" in capsys.readouterr().err
    samples = (document := json.loads((out / "export.json").read_text()))["samples"]
    (out / "export.json").write_text(json.dumps(document | {"splits": {"train": samples + 1}}))  # before a drop
    converted(run, out, "--to", "coco", code=2)
    assert f"another split (train {samples + 1} there, train {samples} asked for)" in capsys.readouterr().err
    (full := tmp_path / "full").mkdir()
    (full / "mine.txt").write_text("mine")
    converted(run, full, "--to", "coco", code=2)
    assert contents(full) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--to", "nothing"), "is not one of"),
        (("--to", "WebDataset"), "did you mean wds?"),
        (("--classes", "bal=x"), "did you mean ball"),
        (("--classes", "ball"), "expected OLD=NEW"),
        (("--task", "semantic:other"), "no such labels"),
        (("--classes", "ball=a,ball=b"), "ball' is given two names"),
        (("--classes", ",".join(f"{name}=" for name in world.CLASSES)), "no class is left"),
        (("--quality", "90", "--image-format", "png"), "--quality: PNG files have none"),
        (("--where", " "), "--where: no condition was given"),
        (("--to", "cityscapes", "--image-format", "jpg"), "--image-format jpg: cityscapes has png files"),
        (("--kept",), "has not been filtered"),
        (("--least-score", "2"), "expected 0 to 1"),
        (("--quality", "74"), "expected 75 to 100"),
        (("--quality", "101"), "expected 75 to 100"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(run, tmp_path, capsys, flags, said):
    out = tmp_path / "out"
    converted(run, out, *(() if "--to" in flags else ("--to", "coco")), *flags, code=2)
    assert said in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("line", [b"00  ../../run.json\n", b"00  images/\xff.png\n", b"00\n"])
def test_an_export_whose_list_of_digests_is_forged_is_named(run, tmp_path, capsys, line):
    out = tmp_path / "out"
    assert main([str(run), "--to", "coco", "--out", str(out), "--quiet"]) == 0
    (out / "SHA256SUMS").write_bytes(line)
    told = json.loads((out / "export.json").read_text())
    (out / "export.json").write_text(json.dumps({**told, "sums": hashlib.sha256(line).hexdigest()}))
    capsys.readouterr()
    assert main([str(run), "--to", "coco", "--out", str(out), "--quiet"]) == 2
    assert "SHA256SUMS: not a valid list of digests" in capsys.readouterr().err


def test_a_target_inside_of_the_run_is_refused_but_for_its_exports(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for inside in (copy, copy / "images", copy / "images" / "new"):
        for source in (copy, run):
            converted(source, inside, "--to", "coco", code=2)
            assert "inside the run folder" in capsys.readouterr().err
    assert main([str(copy), "--to", "coco", "--quiet"]) == 0 and (copy / "exports" / "coco").is_dir()


def test_a_damaged_run_is_a_failed_check_that_names_audit(run, tmp_path, capsys):
    copy = tmp_path / "my run"
    shutil.copytree(run, copy)
    (copy / "images" / "00000002.png").write_bytes(b"no picture")
    converted(copy, tmp_path / "out", "--to", "coco", code=4)
    assert f"datasetdm_fast.audit '{copy}'" in capsys.readouterr().err


def test_classes_are_renamed_joined_and_left_out(run, tmp_path):
    flags = ("--to", "coco", "--classes", "ball=thing,cube=thing,wall=,cone=background")
    out = converted(run, tmp_path / "out", *flags) / "coco" / "annotations"
    told = json.loads((out / "instances_train2017.json").read_text())
    names = {category["id"]: category["name"] for category in told["categories"]}
    counts = {name: sum(names[item["category_id"]] == name for item in told["annotations"]) for name in names.values()}
    truth = [sample.instances.classes[k] for sample in open_run(run) for k in sample.instances.class_ids]
    assert counts["thing"] == truth.count("ball") + truth.count("cube") and "ball" not in counts
    assert truth.count("cone") and "cone" not in counts and "background" not in counts
    stuff = json.loads((out / "stuff_train2017.json").read_text())
    assert "wall" not in {category["name"] for category in stuff["categories"]}


def test_people_that_are_left_out_are_no_category_and_have_no_joints(run, tmp_path):
    usual = converted(run, tmp_path / "usual", "--to", "coco") / "coco/annotations/person_keypoints_train2017.json"
    out = converted(run, tmp_path / "out", "--to", "coco", "--classes", "person=") / "coco" / "annotations"
    told, before = json.loads((out / usual.name).read_text()), json.loads(usual.read_text())
    assert told["categories"] == told["annotations"] == [] and told["images"] == before["images"]
    assert before["categories"] and before["annotations"]


class FakeHub:
    """What is uploaded where, in place of huggingface_hub's client."""

    calls: list = []

    def create_repo(self, name, **facts):
        self.calls.append(("create", name, facts["repo_type"], facts["private"]))
        return f"https://huggingface.co/datasets/{name}"

    def upload_folder(self, **facts):
        self.calls.append(("folder", facts["repo_id"], Path(facts["folder_path"])))

    def upload_file(self, **facts):
        self.calls.append((facts["path_in_repo"], facts["path_or_fileobj"].decode()))


def test_new_names_of_classes_are_trimmed_and_that_of_the_background_leaves_them_out():
    renaming = parse_renaming([" mug = cup ", "sky=", "wall=background", "mug=cup"])
    assert renaming == {"mug": "cup", "sky": "", "wall": ""}


def test_classes_of_maps_come_before_things_and_a_person_with_joints_alone_is_neither():
    tables = number_classes(
        {"semantic": {"classes": ["background", "sky", "mug"]}, "instance": {"classes": ["mug", "jug"]}, "pose": {}}
    )
    renaming, labels = parse_renaming(["jug=can"]), dict.fromkeys(("semantic", "instance", "pose"))
    held = collect_classes(tables, {name: name for name in labels}, renaming)
    assert held == Classes(("sky", "mug", "can", "person"), ("mug", "can"), ("sky",))
    assert held.numbers == {"sky": 1, "mug": 2, "can": 3, "person": 4}
    lookup = number_lookup({0: "background", 3: "sky", 4: "jug", 5: "left out"}, held, renaming)
    assert lookup[:7].tolist() == [0, 255, 255, 1, 3, 0, 255] and lookup[255] == 255
    nothing = collect_classes({"labels": {"depth": {}}}, {"depth": "depth"}, {})
    assert nothing == Classes((), (), ())


def test_splits_of_an_export_begin_with_that_to_train_on():
    document = {"labels": {}}
    opened = object.__new__(conversion.Conversion)
    opened.source = SimpleNamespace(
        rows=lambda: [Row(Request(k, "a", k), {}) for k in range(5)],
        split_of=lambda row: ("test", "b", "val", "train", "a")[row.request.index],
        split=None,
        corrections={},
        run=SimpleNamespace(document=document, path=Path("run")),
    )
    assert [*opened._read_samples()[0]] == ["train", "val", "test", "a", "b"]


def test_an_export_is_another_where_a_prompt_a_file_a_label_or_the_part_of_a_sample_is():
    def digest(prompt="a ball", sha256="ab", path="a.png", labels=(), parts=None):
        files = {"image": RowFile(path, StoredFile(sha256, 9))}
        rows = [Row(Request(k, prompt, k), {}, files, {"x": labels}) for k in (0, 1)]
        opened = object.__new__(conversion.Conversion)
        part_of = dict(enumerate(parts or ("train", "train")))
        opened.source = SimpleNamespace(rows=lambda: rows, split_of=lambda row: part_of[row.request.index])
        opened.source.split, opened.source.corrections = parts, {}
        counts, found = opened._read_samples()
        assert sum(counts.values()) == 2
        return found

    changes = [{"prompt": "a cone"}, {"sha256": "cd"}, {"labels": (1,)}]
    changes += [{"parts": ("train", "val")}, {"parts": ("val", "train")}]  # of each one, in either
    assert len({digest(), *(digest(**each) for each in changes)}) == 6
    assert digest(path="b.png") == digest()


def test_a_farthest_depth_that_is_no_whole_number_is_told(tmp_path):
    plan = SimpleNamespace(classes=Classes((), (), ()), tasks={"depth"}, max_depth=2.5)
    files = wds.table_files(plan)
    assert files["max_depth.txt"] == [b"2.5\n"] and json.loads(files["classes.json"][0])["max_depth"] == 2.5


def test_words_that_the_hub_takes_for_yes_keep_it_offline(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    for text in ("1", "TRUE", "yes", "On", "0", "no"):
        monkeypatch.setenv("HF_HUB_OFFLINE", text)
        with nullcontext() if text in ("0", "no") else pytest.raises(Missing, match="forbids the network"):
            hf.check_hub("me/balls")


def test_an_export_is_uploaded_where_it_is_asked_for(run, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    line = [str(run), "--to", "hf-parquet", "--out", str(tmp_path / "out"), "--push-to-hub", "me/balls"]
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(line) == 3 and "no account is logged in" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    assert main([*line, "--dry-run"]) == 0 and not FakeHub.calls and "uploaded to me/balls" in capsys.readouterr().err
    assert main(line) == 0
    create, folder, (name, card) = FakeHub.calls
    assert create == ("create", "me/balls", "dataset", True) and folder == ("folder", "me/balls", tmp_path / "out")
    assert name == "README.md" and "path: hf-parquet/data/train-*\n" in card and "# balls" in card
    told = capsys.readouterr()
    assert "uploaded to https://huggingface.co/datasets/me/balls" in told.err and "secret" not in told.err + told.out
    monkeypatch.setattr(FakeHub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    assert main(line) == 3 and "the upload failed (ConnectionError: no network)" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(line) == 3 and "HF_HUB_OFFLINE forbids the network" in capsys.readouterr().err
    assert main([*line[:-1], "balls"]) == 2 and "Write OWNER/NAME" in capsys.readouterr().err


def test_hostile_class_names_are_harmless(tmp_path):
    run = tmp_path / "run"
    described = document(2, SIZE)
    names = [*HOSTILE_NAMES, *map(str, range(7))][:7]
    described["labels"]["instance"]["classes"] = names
    described["labels"]["semantic"]["classes"] = ["wall", "table", *names]
    described |= number_classes(described["labels"])
    with RunFolder(run, described) as folder:
        folder.add([rendered(k, SIZE) for k in range(2)], {})
        finish_run(folder)
    out = converted(run, tmp_path / "out", "--to", ",".join(set(EXPORT_FORMATS) - {"cityscapes"}))
    for kind in ("coco", "yolo-seg"):
        assert set(open_data(f"{kind}:{out}/{kind}", SIZE).thing_classes) == set(names)
    root = out / "voc" / "VOCdevkit" / "VOC2012"
    assert len((root / "labelmap.txt").read_text().splitlines()) == 2 + len(names) + len(("wall", "table", "person"))
    for path in (root / "Annotations").iterdir():
        assert {item.findtext("name") for item in ElementTree.parse(path).iterfind("object")} <= set(names)
    assert set(names) < set(runpy.run_path(str(out / "mmseg" / "dataset.py"))["metainfo"]["classes"])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_no_conversion_imports_torch(run, tmp_path):
    code = (
        "import sys; from datasetdm_fast.convert import main; "
        f"code = main([{str(run)!r}, '--to', 'coco', '--out', {str(tmp_path / 'out')!r}, '--quiet']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_and_rows_that_cannot_be_read_fail_the_check_of_the_run(tmp_path):
    def fail(error):
        def read(*_):
            raise error

        return read

    (tmp_path / "images").mkdir()
    row = SimpleNamespace(files={"image": RowFile("images/0.png", SimpleNamespace(size=1, sha256=""))})
    view = object.__new__(SampleView)
    for error, is_there, said in (
        (Refused("images/0.png: 9 bytes", "Look."), False, "9 bytes"),
        (Missing("images/0.png: denied", "Look."), True, "denied"),
        (Missing("images/0.png: no such file", "Look."), False, "is missing or has changed"),
    ):
        (tmp_path / "images/0.png").touch() if is_there else (tmp_path / "images/0.png").unlink(missing_ok=True)
        view.stored = SimpleNamespace(row=row, folder=tmp_path, run=tmp_path, read=fail(error))
        with pytest.raises(GateFailed, match=said) as failure:
            view.read("image")
        assert "datasetdm_fast.audit" in failure.value.remedy
    damaged = SimpleNamespace(rows=fail(Refused("row 3 is no row", "Look.")), shards=None, path=tmp_path)
    with pytest.raises(GateFailed, match=f"{tmp_path}: row 3 is no row"):
        list(ExportSource(damaged, {}, None, None, {}).rows())


def test_one_label_of_a_kind_is_exported_where_several_are_named():
    run = SimpleNamespace(tasks=("semantic", "semantic:other"), path="run")
    assert choose_labels(run, ()) == {"semantic": "semantic"}
    assert choose_labels(run, ("semantic:other",)) == {"semantic": "semantic:other"}
    with pytest.raises(Refused, match="semantic and semantic:other cannot both be exported"):
        choose_labels(run, run.tasks)


def test_files_that_a_format_of_a_package_makes_are_bytes():
    def written(content):
        format = SimpleNamespace(convert_sample=lambda *_: ({"a.txt": content}, {}))
        return conversion.convert_by_package("voc", format, SimpleNamespace(stored=SimpleNamespace(id="0")), None)

    assert written(b"x") == ({"a.txt": b"x"}, {})
    with pytest.raises(Exception, match="a.txt: a str, expected bytes or a Linked"):
        written("x")


def test_an_export_of_a_later_version_is_not_read(run, tmp_path):
    converted(run, tmp_path, "--to", "coco")
    told = read_export(tmp_path)
    (tmp_path / "export.json").write_text(json.dumps({**told, "format": told["format"] + 1}))
    with pytest.raises(Refused, match=f"export.json: format {told['format'] + 1}, this version reads"):
        read_export(tmp_path)


def test_without_pyarrow_no_parquet_is_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    converted(run, tmp_path / "out", "--to", "hf-parquet", code=3)
    asked = "--to hf-parquet: pyarrow is not installed\nInstall it with: pip install 'datasetdm-fast[hf]'.\n"
    assert asked in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_classes_that_a_format_lacks_are_named_before_its_samples(run, tmp_path, capsys):
    assert main([str(run), "--to", "cityscapes", "--classes", "ball=car", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "cityscapes: none of its classes are ball, cube" not in told and "which --classes can rename" in told
    assert "cityscapes: none of its classes are table, cube, cone" in told


def test_the_map_of_a_run_without_instances_is_its_own():
    below = np.uint8([[1, 2]])
    sample = SimpleNamespace(semantic=below, height=1, width=2)
    assert class_map(sample, SimpleNamespace(tasks={"semantic"})) is below
    assert class_map(sample, SimpleNamespace(tasks={"depth"})).tolist() == [[0, 0]]


@pytest.mark.parametrize("data", [b"other", b"equa", b"", b"equals"])
def test_bytes_that_are_not_those_written_are_never_exported(data):
    written = storage.StoredFile(hashlib.sha256(b"equal").hexdigest(), 5)
    row = SimpleNamespace(files={"image": RowFile("images/0.png", written)})
    view = SimpleNamespace(stored=SimpleNamespace(row=row, read=lambda role: b"equal", run="run"))
    assert SampleView.read(view, "image") == b"equal"
    view.stored.read = lambda role: data
    with pytest.raises(GateFailed, match="run/images/0.png: it is missing or has changed since it was written"):
        SampleView.read(view, "image")


def test_the_format_that_the_page_shows_writes_what_it_says(run, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    code, names = page[page.index("from datasetdm_fast.runs.exporting.format") :].split("```")[0], {}
    exec(code, names)
    monkeypatch.setitem(EXPORT_FORMATS, "mmseg", names["LISTING"])
    out = converted(run, tmp_path / "out", "--to", "mmseg") / "mmseg"
    numbers = {name: number for number, name in enumerate(read_export(out.parent)["classes"], 1)}
    stored = [sample.instances for sample in open_run(run)]
    for k, things in enumerate(stored):
        lines = [line.split() for line in (out / f"train/{k:08d}.txt").read_text().splitlines()]
        assert [int(number) for number, _ in lines] == [numbers[things.classes[one]] for one in things.class_ids]
    assert [int(line) for line in (out / "train.txt").read_text().split()] == [len(things.masks) for things in stored]
