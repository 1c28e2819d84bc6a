"""Every export format holds the numbers computed by hand here from one picture of 6 x 4 pixels.

row 0   s s s P P .      s sky, v vegetation, P person 0.8, A car 0.9, C car 0.6, . ignored
row 1   s A A A P s      A covers columns 1-3 of rows 1-2, P columns 3-4 of all rows, C columns 0-1 of rows 2-3;
row 2   C A A A P v      where they overlap, the higher score is in front. The order of the run is P, A, C.
row 3   C C v P P v
"""

import io
import json
import runpy
import tarfile
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image
from rendered import document

from datasetdm_fast.config import EXPORT_FORMATS
from datasetdm_fast.convert import main
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Request, Sample, SemanticMap
from datasetdm_fast.engine.labels import mask_rle, number_classes
from datasetdm_fast.runs.exporting import annotation_tools, cityscapes, coco, depth, format, hf, rings, voc, wds, yolo
from datasetdm_fast.runs.exporting.classes import Classes
from datasetdm_fast.runs.exporting.format import ExportedPerson, ExportedThing
from datasetdm_fast.runs.exporting.settings import PictureSettings
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import RowFile
from datasetdm_fast.runs.run_folder.reader import open_run

WIDTH, HEIGHT = 6, 4
MAPS, THINGS = ("sky", "vegetation"), ("car", "person", "bicycle")
JOINTS, LIMBS = ("nose", "left_hand", "right_hand"), ((0, 1), (0, 2))
SKY, VEGETATION, CAR, PERSON, BICYCLE = 1, 2, 3, 4, 5  # numbers of the export: maps first, then things
LABELS = [[SKY] * 5 + [255], [SKY] * 6, [VEGETATION] * 6, [VEGETATION] * 6]
FRONT = [[1, 1, 1, 4, 4, 255], [1, 3, 3, 3, 4, 1], [3, 3, 3, 3, 4, 2], [3, 3, 2, 4, 4, 2]]  # things over the map
BOXES = [[3, 0, 2, 4], [1, 1, 3, 2], [0, 2, 2, 2]]  # x, y, width, height of P, A and C
AREAS, SCORES, KINDS = [8, 6, 4], [0.8, 0.9, 0.6], [PERSON, CAR, CAR]
# column by column, zeros first
COUNTS = [[12, 8, 4], [5, 2, 2, 2, 2, 2, 9], [2, 2, 2, 2, 16]]
RUNS = ["<84", "5220007", "2220>"]  # the same, compressed
SKY_COUNTS, VEGETATION_COUNTS = [0, *[2] * 9, 3, 1, 2], [2] * 12
METRES = [1.0, 2.51, 65.535, 70.0]  # of the rows; 642.56 steps of 1/256 m, and 643 of those are 2511.7 mm
HANDS = [[3.0, 0.0, 2, 4.0, 1.5, 1, 0, 0, 0], [0.375, 3.0, 2, 0, 0, 0, 0, 0, 0]]  # from the middle of the first pixel
PEOPLE_BOXES = [[3, 0, 2, 4], [0, 1.5, 2.875, 2.5]]  # that of the mask; a joint at (0.875, 3.5) with 2 pixels around it


def sample() -> Sample:
    image = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)
    labels = np.repeat(np.array([0, 0, 1, 1], np.uint8)[:, None], WIDTH, 1)
    labels[0, 5] = 255
    masks = np.zeros((3, HEIGHT, WIDTH), bool)
    for mask, (x, y, width, height) in zip(masks, BOXES, strict=True):
        mask[y : y + height, x : x + width] = True
    points = np.zeros((2, 3, 3), np.float32)
    points[..., 2] = 0.75
    points[0, :2, :2], points[1, 0, :2] = [[3.5, 0.5], [4.5, 2.0]], [0.875, 3.5]  # from the edge of the first pixel
    return Sample(
        Request(0, "a car", 7),
        image,
        {
            "semantic": SemanticMap(labels, np.ones((HEIGHT, WIDTH), np.float32), MAPS),
            "instance": Instances(masks, np.array([1, 0, 0]), np.array(SCORES, np.float32), THINGS),
            "depth": DepthMap(np.repeat(np.array(METRES, np.float32)[:, None], WIDTH, 1), 80.0),
            "pose": Keypoints(
                points, np.array([[2, 1, 0], [2, 0, 0]]), np.array([0.7, 0.6], np.float32), JOINTS, LIMBS
            ),
        },
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("values") / "run"
    described = document(1)
    described["config"]["task"] = ["semantic", "instance", "depth", "pose"]
    described["decoders"].pop("open-vocabulary")
    described["decoders"]["depth"]["licence"] = "MIT"
    tables = {task: described["labels"][task] for task in described["config"]["task"]}
    tables["semantic"] |= {"classes": list(MAPS)}
    tables["instance"] |= {"classes": list(THINGS), "size": [HEIGHT, WIDTH]}
    tables["depth"] = {"max_depth": 80.0, "unit": "1/256 metre"}
    tables["pose"] |= {"joints": list(JOINTS), "limbs": [list(limb) for limb in LIMBS], "size": [HEIGHT, WIDTH]}
    with RunFolder(path, described | number_classes(tables)) as folder:
        folder.add([sample()], {"batch_size": 1, "sides": [HEIGHT, WIDTH]})
        finish_run(folder)
    return path


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder of a format's export, by its name."""
    out = tmp_path_factory.mktemp("exports")

    def export(name: str, *more: str):
        place = out / "".join([name, *more])
        if not place.exists():
            line = [str(run), "--out", str(place), "--to", name, "--quiet", *more]
            assert main(line) == 0
        return place / name

    return export


def pixels(path) -> list:
    return np.asarray(Image.open(path)).tolist()


def read(path):
    return json.loads(path.read_text())


def rectangle(x: float, y: float, width: float, height: float) -> list[float]:
    """Its corners, clockwise from the upper left one."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def rows(*numbers: int) -> list[list[int]]:
    return [[number] * WIDTH for number in numbers]


ANNOTATIONS = [
    {
        "id": k + 1,
        "image_id": 0,
        "category_id": KINDS[k],
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": RUNS[k]},
        "area": AREAS[k],
        "bbox": BOXES[k],
        "iscrowd": 0,
        "score": SCORES[k],
    }
    for k in range(3)
]
PERSONS = [
    {
        "category_id": PERSON,
        "image_id": 0,
        "keypoints": HANDS[k],
        "num_keypoints": (2, 1)[k],  # the hidden joint is counted, the absent one is not
        "keypoint_scores": [0.75] * 3,
        "score": (0.7, 0.6)[k],
        "area": (8, 7.188)[k],
        "bbox": PEOPLE_BOXES[k],
        "iscrowd": 0,
    }
    for k in range(2)
]
UNCOMPRESSED = [
    each | {"segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}
    for each, counts in zip(ANNOTATIONS, COUNTS, strict=True)
]
PANOPTIC = [[4, 4, 4, 2, 2, 0], [4, 1, 1, 1, 2, 4], [3, 1, 1, 1, 2, 5], [3, 3, 5, 2, 2, 5]]
SEGMENTS = [(CAR, 6, [1, 1, 3, 2]), (PERSON, 6, [3, 0, 2, 4]), (CAR, 3, [0, 2, 2, 2])]
SEGMENTS += [(SKY, 5, [0, 0, 6, 2]), (VEGETATION, 3, [2, 2, 4, 2])]


def test_every_format_has_its_numbers_here():
    source = open(__file__, encoding="utf-8").read()
    assert all(f'exported("{name}"' in source for name in EXPORT_FORMATS.names)


def test_the_run_itself(run):
    held = read(run / "instances.json")
    assert held["images"] == [{"id": 0, "file_name": "images/00000000.png", "width": WIDTH, "height": HEIGHT}]
    numbers = {row["name"]: row["id"] for row in held["categories"]}
    names = {CAR: "car", PERSON: "person"}
    assert held["annotations"] == [{**each, "category_id": numbers[names[each["category_id"]]]} for each in ANNOTATIONS]
    people = read(run / "keypoints.json")
    assert people["categories"][0]["skeleton"] == [[1, 2], [1, 3]]
    assert people["annotations"] == [
        {**each, "id": k + 4, "category_id": numbers["person"], "box_from": ("instance", "joints")[k]}
        for k, each in enumerate(PERSONS)
    ]
    assert pixels(run / "semantic/00000000.png") == [[0] * 5 + [255], [0] * 6, [1] * 6, [1] * 6]
    assert pixels(run / "depth/00000000.png") == rows(256, 643, 16777, 17920)


def test_labels_of_a_picture_without_things_have_the_sides_of_its_row(run):
    with open_run(run) as opened:
        stored = opened[0]
        empty = replace(stored, row=replace(stored.row, labels=stored.row.labels | {"instance": [], "pose": []}))
        assert empty.label("instance").masks.shape == (0, HEIGHT, WIDTH)
        assert empty.label("pose").points.shape == (0, len(JOINTS), 3)


def test_an_export_tells_the_licences_of_the_model_and_of_all_decoders(exported):
    assert read(exported("coco").parent / "export.json")["licences"] == ["Apache-2.0", "MIT"]


def test_coco(exported):
    out = exported("coco") / "annotations"
    held = read(out / "instances_train2017.json")
    assert held["annotations"] == UNCOMPRESSED
    assert held["images"] == [{"id": 0, "file_name": "00000000.png", "width": WIDTH, "height": HEIGHT}]
    assert {row["id"]: row["name"] for row in held["categories"]} == {CAR: "car", PERSON: "person", BICYCLE: "bicycle"}
    people = read(out / "person_keypoints_train2017.json")
    assert people["annotations"] == [{"id": k + 1, **each} for k, each in enumerate(PERSONS)]
    assert people["categories"][0]["keypoints"] == list(JOINTS)
    assert people["categories"][0]["skeleton"] == [[1, 2], [1, 3]]
    stuff = [(SKY, SKY_COUNTS, 11, [0, 0, 6, 2]), (VEGETATION, VEGETATION_COUNTS, 12, [0, 2, 6, 2])]
    assert read(out / "stuff_train2017.json")["annotations"] == [
        {
            "id": k + 1,
            "image_id": 0,
            "category_id": number,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
            "area": area,
            "bbox": box,
            "iscrowd": 0,
        }
        for k, (number, counts, area, box) in enumerate(stuff)
    ]
    polygons = exported("coco", "--polygons") / "annotations/instances_train2017.json"
    assert [each["segmentation"] for each in read(polygons)["annotations"]] == [[rectangle(*box)] for box in BOXES]


def test_no_two_splits_have_an_annotation_of_the_same_id():
    entries = {split: [{"image": {"id": k}, "instances": [{}, {}]}] for k, split in enumerate(("train", "val"))}
    samples = SimpleNamespace(entries=lambda split: iter(entries[split]))
    held = coco.number_annotations(SimpleNamespace(splits={"train": 1, "val": 1}), samples, "instances", "val")
    assert list(held) == [{"id": 3, "image_id": 1}, {"id": 4, "image_id": 1}]


def test_the_least_score_of_things_and_people_is_kept(exported):
    for least, things, people in (("0.6", [0.8, 0.9, 0.6], [0.7, 0.6]), ("0.7", [0.8, 0.9], [0.7])):
        out = exported("coco", "--least-score", least) / "annotations"
        for kind, scores in (("instances", things), ("person_keypoints", people)):
            held = read(out / f"{kind}_train2017.json")["annotations"]
            assert [each["score"] for each in held] == scores and [each["id"] for each in held] == [
                *range(1, 1 + len(scores))
            ]


def test_pycocotools_reads_the_masks_and_boxes_of_coco_and_lvis(exported):
    from pycocotools import mask as masks
    from pycocotools.coco import COCO

    for path in (exported("coco") / "annotations/instances_train2017.json", exported("lvis") / "lvis_v1_train.json"):
        index = COCO(str(path))
        for item, (x, y, width, height) in zip(index.loadAnns(index.getAnnIds()), BOXES, strict=True):
            expected = np.zeros((HEIGHT, WIDTH), np.uint8)
            expected[y : y + height, x : x + width] = 1
            assert (index.annToMask(item) == expected).all()
            held = masks.frPyObjects(item["segmentation"], HEIGHT, WIDTH)  # as transformers' DETR calls it
            assert (masks.decode(held) == expected).all() and masks.toBbox(held).tolist() == item["bbox"]
            assert masks.area(held) == item["area"]


def test_a_person_with_joints_alone_is_no_thing_of_panoptic_files():
    classes = Classes(("sky", "car", "person"), ("car",), ("sky",))
    plan = SimpleNamespace(classes=classes, splits={"train": 1})
    entry = {"image": {"id": 7, "file_name": "a.b.jpg"}, "panoptic": []}
    held = json.loads(b"".join(coco._panoptic(plan, SimpleNamespace(entries=lambda split: iter([entry])), "train")))
    assert held["annotations"] == [{"image_id": 7, "file_name": "a.b.png", "segments_info": []}]
    assert [(row["name"], row["isthing"]) for row in held["categories"]] == [("sky", 0), ("car", 1), ("person", 0)]


def panoptic_numbers(path) -> list:
    red, green, blue = np.moveaxis(np.asarray(Image.open(path)).astype(int), 2, 0)
    return (red + 256 * green + 256 * 256 * blue).tolist()


def test_panoptic(exported):
    out = exported("coco") / "annotations"
    assert panoptic_numbers(out / "panoptic_train2017/00000000.png") == PANOPTIC
    held = read(out / "panoptic_train2017.json")
    assert held["annotations"] == [
        {
            "image_id": 0,
            "file_name": "00000000.png",
            "segments_info": [
                {"id": k, "category_id": number, "area": area, "bbox": box, "iscrowd": 0}
                for k, (number, area, box) in enumerate(SEGMENTS, 1)
            ],
        }
    ]
    assert [(row["id"], row["isthing"]) for row in held["categories"]] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]


def test_the_colour_of_a_panoptic_segment_is_its_number_to_the_base_256():
    masks = np.eye(300, dtype=bool).reshape(300, 15, 20)
    things = [ExportedThing("car", 0.9, rle, 1, (0, 0, 1, 1)) for rle in mask_rle.encode(masks).rles]
    nothing = np.zeros((15, 20), np.uint8)
    facts = {"split": "train", "name": "a", "number": 0, "width": 20, "height": 15, "things": things}
    sample = SimpleNamespace(picture=lambda forms: ("png", b""), semantic=nothing, ignored=nothing > 0, **facts)
    layout, classes = SimpleNamespace(polygons=False), Classes(("car",), ("car",), ())
    plan = SimpleNamespace(tasks={"instance", "semantic"}, layout=layout, classes=classes)
    files, _ = coco.CocoFormat().convert_sample(sample, plan)
    written = io.BytesIO(files["annotations/panoptic_train2017/a.png"])
    assert panoptic_numbers(written) == np.arange(1, 301).reshape(15, 20).tolist()


def test_lvis(exported):
    held = read(exported("lvis") / "lvis_v1_train.json")
    assert held["annotations"] == UNCOMPRESSED
    (image,) = held["images"]
    assert image["neg_category_ids"] == [BICYCLE] and image["not_exhaustive_category_ids"] == []
    counts = {row["name"]: (row["image_count"], row["instance_count"], row["frequency"]) for row in held["categories"]}
    assert counts == {"car": (1, 2, "r"), "person": (1, 1, "r"), "bicycle": (0, 0, "r")}


def test_how_often_images_show_a_class_is_told_as_lvis_counts():
    shown = {"rare": 10, "common": 11, "also common": 100, "frequent": 101}  # images, each with it twice
    numbers = {name: k for k, name in enumerate(shown, 1)}
    entries = [
        {"image": {"id": k}, "instances": [{"category_id": numbers[name]} for name in shown if k < shown[name]] * 2}
        for k in range(101)
    ]
    plan = SimpleNamespace(classes=SimpleNamespace(numbers=numbers, things=tuple(shown)), splits={"train": 101})
    held = json.loads(b"".join(coco._lvis(plan, SimpleNamespace(entries=lambda split: iter(entries)), "train")))
    assert {row["name"]: (row["frequency"], row["image_count"]) for row in held["categories"]} == {
        name: (frequency, count) for (name, count), frequency in zip(shown.items(), "rccf")
    }


def test_voc(exported):
    root = exported("voc") / "VOCdevkit/VOC2012"
    assert pixels(root / "SegmentationClass/00000000.png") == FRONT
    objects = [[0, 0, 0, 1, 1, 255], [0, 2, 2, 2, 1, 0], [3, 2, 2, 2, 1, 0], [3, 3, 0, 1, 1, 0]]
    assert pixels(root / "SegmentationObject/00000000.png") == objects
    annotation = ElementTree.parse(root / "Annotations/00000000.xml")
    assert [annotation.findtext(f"size/{side}") for side in ("width", "height", "depth")] == ["6", "4", "3"]
    boxes = [
        [each.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        for each in annotation.iter("object")
    ]
    assert boxes == [["4", "1", "5", "4"], ["2", "2", "4", "3"], ["1", "3", "2", "4"]]  # from 1, the last one inside
    assert [(each.findtext("name"), each.findtext("truncated")) for each in annotation.iter("object")] == [
        ("person", "1"),
        ("car", "0"),
        ("car", "1"),
    ]
    assert (root / "labelmap.txt").read_text().splitlines()[1:] == [
        "background:0,0,0::",
        "sky:128,0,0::",
        "vegetation:0,128,0::",
        "car:128,128,0::",
        "person:0,0,128::",
        "bicycle:128,0,128::",
    ]
    assert Image.open(root / "SegmentationClass/00000000.png").getpalette()[:12] == [
        0,
        0,
        0,
        128,
        0,
        0,
        0,
        128,
        0,
        128,
        128,
        0,
    ]
    assert (root / "ImageSets/Segmentation/train.txt").read_text() == "00000000\n"


def test_instances_alone_are_objects_and_classes_of_voc(exported):
    root = exported("voc", "--task", "instance") / "VOCdevkit/VOC2012"
    car, person = 7, 15  # as all classes are VOC's
    classes = [[{CAR: car, PERSON: person}.get(number, 0) for number in row] for row in FRONT]
    assert pixels(root / "SegmentationClass/00000000.png") == classes
    objects = [[0, 0, 0, 1, 1, 0], [0, 2, 2, 2, 1, 0], [3, 2, 2, 2, 1, 0], [3, 3, 0, 1, 1, 0]]
    assert pixels(root / "SegmentationObject/00000000.png") == objects


def test_a_border_of_voc_lies_around_objects_and_not_around_what_is_ignored():
    number, ignored = np.zeros((8, 12), np.int32), np.zeros((8, 12), bool)
    number[:, :3], ignored[:, 9:] = 1, True
    semantic = np.where(ignored, 255, 0).astype(np.uint8)
    thing = SimpleNamespace(name="car", box=(0, 0, 3, 8))
    sample = SimpleNamespace(name="a", width=12, height=8, things=[thing], semantic=semantic, ignored=ignored)
    sample.picture, sample.number_things = lambda forms: ("jpg", b""), number.copy
    layout, classes = SimpleNamespace(border=2), Classes(("car",), ("car",), ())
    plan = SimpleNamespace(tasks={"semantic", "instance"}, classes=classes, layout=layout)
    files, _ = voc.VocFormat().convert_sample(sample, plan)
    for part, of_car in (("Class", 7), ("Object", 1)):
        row = np.array(Image.open(io.BytesIO(files[f"{voc.ROOT}/Segmentation{part}/a.png"])))[4].tolist()
        assert row == [of_car, of_car, 255, 255, 0, 0, 0, 0, 0, 255, 255, 255]


def test_an_object_of_voc_is_truncated_by_any_border_of_its_picture():
    boxes = [(0, 1, 2, 2), (1, 0, 2, 2), (4, 1, 2, 2), (1, 2, 2, 2), (1, 1, 4, 2)]  # the last one touches none
    things = [SimpleNamespace(name="<car> & co", box=box) for box in boxes]
    sample = SimpleNamespace(name="a", width=WIDTH, height=HEIGHT, things=things)
    annotation = ElementTree.fromstring("".join(voc._annotation(sample, True)))
    assert [each.text for each in annotation.iter("truncated")] == ["1", "1", "1", "1", "0"]
    assert {each.findtext("name") for each in annotation.iter("object")} == {"<car> & co"}


def test_classes_of_voc_have_its_numbers_and_others_those_of_the_export():
    known, others = (Classes(names, names, ()) for names in (("person", "cat"), ("person", "mug")))
    assert {name: voc.numbers(known)[name] for name in known.names} == {"person": 15, "cat": 8}
    assert voc.numbers(others) == {"person": 1, "mug": 2}
    assert [voc._clean_name(name) for name in ("C#", "#1 fan", "a:b")] == ["C#", "1 fan", "a b"]


def test_yolo(exported):
    third, sixth = "0.3333333333", "0.1666666667"
    assert (exported("yolo-detect") / "labels/train/00000000.txt").read_text().splitlines() == [
        f"1 0.6666666667 0.5 {third} 1",  # class, middle and sides
        "0 0.4166666667 0.5 0.5 0.5",
        f"0 {sixth} 0.75 {third} 0.5",
    ]
    assert (exported("yolo-seg") / "labels/train/00000000.txt").read_text().splitlines() == [
        "1 0.5 0 0.8333333333 0 0.8333333333 1 0.5 1",
        f"0 {sixth} 0.25 0.6666666667 0.25 0.6666666667 0.75 {sixth} 0.75",
        f"0 0 0.5 {third} 0.5 {third} 1 0 1",
    ]
    assert (exported("yolo-pose") / "labels/train/00000000.txt").read_text().splitlines() == [
        f"0 0.6666666667 0.5 {third} 1 0.5833333333 0.125 2 0.75 0.5 1 0 0 0",
        "0 0.2395833333 0.6875 0.4791666667 0.625 0.1458333333 0.875 2 0 0 0 0 0 0",
    ]
    description = (exported("yolo-pose") / "data.yaml").read_text()
    assert "nc: 1\nkpt_shape:\n- 3\n- 3\nflip_idx:\n- 0\n- 2\n- 1\n" in description
    assert "names:\n  0: car\n  1: person\n  2: bicycle\n" in (exported("yolo-detect") / "data.yaml").read_text()


def test_boxes_and_joints_of_yolo_end_at_the_border_of_the_picture():
    joints = np.array([[5.6, -0.6, 2], [-0.6, 3.6, 1]])
    person = ExportedPerson("person", joints, (0.7, 0.7), 0.7, 24, (-1, -1, 9, 9))
    sample = SimpleNamespace(width=WIDTH, height=HEIGHT, people=[person])
    assert list(yolo.YoloPose().lines(sample, None)) == ["0 0.5 0.5 1 1 1 0 2 0 1 1"]


@pytest.mark.parametrize(
    ("splits", "places"),
    [
        ({"train": 2}, {"train": "images/train", "val": "images/train"}),
        ({"val": 2}, {"train": "images/val", "val": "images/val"}),
        ({"train": 2, "test": 1}, {"train": "images/train", "val": "images/train", "test": "images/test"}),
        ({"train": 2, "val": 1}, {"train": "images/train", "val": "images/val"}),
    ],
)
def test_yolo_trains_and_validates_on_the_splits_that_are_there(splits, places):
    plan = SimpleNamespace(splits=splits, classes=SimpleNamespace(things=("car",)))
    told = yaml.safe_load(yolo.YoloDetect().shared_files(plan, None)["data.yaml"][0])
    assert told == {**places, "nc": 1, "names": {0: "car"}}


def test_cityscapes(exported):
    folder = exported("cityscapes") / "gtFine/train/synthetic"
    stem = "synthetic_000000_000000_gtFine"
    assert pixels(folder / f"{stem}_labelIds.png") == [
        [23, 23, 23, 24, 24, 0],
        [23, 26, 26, 26, 24, 23],
        [26, 26, 26, 26, 24, 21],
        [26, 26, 21, 24, 24, 21],
    ]
    assert pixels(folder / f"{stem}_labelTrainIds.png") == [
        [10, 10, 10, 11, 11, 255],
        [10, 13, 13, 13, 11, 10],
        [13, 13, 13, 13, 11, 8],
        [13, 13, 8, 11, 11, 8],
    ]
    person, front, behind = 24000, 26000, 26001
    assert pixels(folder / f"{stem}_instanceIds.png") == [
        [23, 23, 23, person, person, 0],
        [23, front, front, front, person, 23],
        [behind, front, front, front, person, 21],
        [behind, behind, 21, person, person, 21],
    ]
    colours = np.array(pixels(folder / f"{stem}_color.png"))
    shown = {
        (0, 0): [70, 130, 180],
        (3, 2): [107, 142, 35],
        (1, 1): [0, 0, 142],
        (0, 3): [220, 20, 60],
        (0, 5): [0, 0, 0],
    }
    assert all(colours[place].tolist() == colour for place, colour in shown.items())
    polygons = read(folder / f"{stem}_polygons.json")
    assert (polygons["imgHeight"], polygons["imgWidth"]) == (HEIGHT, WIDTH)
    assert sorted(each["label"] for each in polygons["objects"]) == [
        "car", "car", "person", "sky", "sky", "vegetation", "vegetation"
    ]  # fmt: skip
    (car,) = [each["polygon"] for each in polygons["objects"] if [1, 1] in each["polygon"] and each["label"] == "car"]
    assert car == [[1, 1], [3, 1], [3, 2], [1, 2]]  # through the outermost pixels


def test_a_thousand_and_first_car_has_no_number_of_its_own_in_cityscapes():
    sample = SimpleNamespace(
        number_things=lambda: np.arange(1, 1002, dtype=np.int32)[None], things=[SimpleNamespace(name="car")] * 1001
    )
    assert cityscapes._instances(sample, np.full((1, 1001), 26, np.uint8))[0].tolist() == [*range(26000, 27000), 26]


def test_hidden_things_of_cityscapes_take_no_number():
    things = [SimpleNamespace(name=name) for name in ("car", "car", "person", "car")]
    sample = SimpleNamespace(number_things=lambda: np.array([[1, 3, 4, 0]]), things=things)
    assert cityscapes._instances(sample, np.array([[26, 24, 26, 7]], np.uint8)).tolist() == [[26000, 24000, 26001, 7]]


def test_depth(exported):
    (nyu,) = exported("nyu").rglob("sync_depth_00000000.png")
    assert pixels(nyu) == rows(1000, 2512, 65535, 0)  # millimetres; 16 bits end at 65.5 m
    assert pixels(exported("kitti") / "gt_depth/synthetic/00000000.png") == rows(256, 643, 16777, 17920)
    assert (exported("nyu") / "train_list.txt").read_text() == (
        "/synthetic/rgb_00000000.png /synthetic/sync_depth_00000000.png 518.8579\n"
    )
    assert (exported("kitti") / "kitti_eigen_train.txt").read_text() == (
        "synthetic/00000000.png synthetic/00000000.png 721.5377\n"
    )


def test_a_split_to_validate_on_is_called_test_where_there_is_none_of_that_name():
    """The originals know train and test alone."""
    for splits, name in ((("train", "val"), "test"), (("train", "val", "test"), "val")):
        assert depth.published_split("val", SimpleNamespace(splits=splits)) == name
        assert depth.published_split("train", SimpleNamespace(splits=splits)) == "train"
    plan = SimpleNamespace(splits=("train", "val"))
    assert {*depth.NyuFormat().shared_files(plan, None)} == {"train_list.txt", "test_list.txt", "nyu_class_list.json"}
    assert {*depth.KittiFormat().shared_files(plan, None)} == {"kitti_eigen_train.txt", "kitti_eigen_test.txt"}
    place, *_ = depth.NyuFormat().places("val", "a", "png", plan)
    assert place == ("official_splits/test", "official_splits/test")


def check_record(record: dict, semantic, depth, mode: str = "P") -> None:
    """A sample as hf, hf-parquet and wds describe it; readers of wds take the colours of a palette for the pixels."""
    assert Image.open(semantic).mode == mode
    assert (record["prompt"], record["seed"], record["width"], record["height"]) == ("a car", 7, WIDTH, HEIGHT)
    objects = record["objects"]
    assert (objects["category"], objects["bbox"], objects["area"]) == (KINDS, BOXES, AREAS)
    assert (objects["rle"], objects["score"]) == (RUNS, SCORES)
    people = record["people"]
    assert (people["keypoints"], people["bbox"], people["area"]) == (HANDS, PEOPLE_BOXES, [8, 7.188])
    assert pixels(semantic) == LABELS and pixels(depth) == rows(256, 643, 16777, 17920)


def test_records_of_hf_parquet_and_wds(exported):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    out = exported("hf") / "train"
    check_record(read(out / "metadata.jsonl"), out / "semantic/00000000.png", out / "depth/00000000.png")
    table = parquet.read_table(exported("hf-parquet") / "data/train-00000-of-00001.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["objects"]["category"]["feature"]["names"] == ["background", *MAPS, *THINGS]
    assert features["image"] == features["semantic"] == {"_type": "Image"} and list(features) == table.column_names
    (row,) = table.to_pylist()
    check_record(row, *(io.BytesIO(row[name]["bytes"]) for name in ("semantic", "depth")))
    assert (exported("wds") / "train-000000.tar").stat().st_size % 10240 == 0  # as tar fills its last record
    with tarfile.open(exported("wds") / "train-000000.tar") as shard:
        parts = {name: shard.extractfile(name) for name in shard.getnames()}
        files = (io.BytesIO(parts[f"00000000.{name}.png"].read()) for name in ("semantic", "depth"))
        check_record(json.load(parts["00000000.json"]), *files, "L")
    table = read(exported("wds") / "classes.json")
    assert table["depth_steps_of_a_metre"] == 256 and table["id2label"]["3"] == "car"
    assert (table["joints"], table["limbs"]) == (list(JOINTS), [list(limb) for limb in LIMBS])
    for name in ("wds", "hf", "hf-parquet"):
        assert (exported(name) / "max_depth.txt").read_text() == "80\n"


@pytest.mark.parametrize("formats", [["coco", "wds", "hf-parquet"], ["hf", "wds"], ["coco"]])
def test_the_page_on_the_hub_names_the_files_of_one_format_by_splits_of_datasets(tmp_path, formats):
    export = {"format": 1, "complete": True, "settings": {"to": formats}, "runs": [], "samples": 3}
    (tmp_path / "export.json").write_text(json.dumps({**export, "splits": {"train": 2, "val": 1, "my-part": 1}}))
    if "wds" in formats:
        (tmp_path / "wds").mkdir()
        files = [{"split": "train", "path": "train-*"}]
        (tmp_path / "wds/README.md").write_text(f"---\n{json.dumps({'configs': [{'data_files': files}]})}\n---\ntext\n")
    _, head, text = hf.describe_export("me/run", tmp_path).split("---\n")
    head = yaml.safe_load(head)
    assert head.pop("tags") == ["synthetic", "datasetdm_fast"] and text.startswith("# run\n\n3 generated images")
    files = [part for config in head.get("configs", ()) for part in config["data_files"]]
    found = [(part["split"], part["path"]) for part in files]
    if "hf-parquet" in formats:
        assert found == [(name, f"hf-parquet/data/{name}-*") for name in ("train", "validation", "my_part")]
    else:
        assert found == ([("train", "wds/train-*")] if "wds" in formats else [])


def test_a_row_group_ends_at_64_rows_or_where_its_pictures_fill_it(monkeypatch):
    monkeypatch.setattr(hf, "_row", lambda size, plan: {"id": "a", "image": {"bytes": bytes(size)}})
    monkeypatch.setattr(hf, "GROUP_BYTES", 10)
    for sizes, rows_of_groups in (([6, 6, 4, 4, 4, 1], [2, 3, 1]), ([5, 5, 1], [2, 1]), ([0] * 130, [64, 64, 2])):
        assert [len(group) for group in hf._groups(iter(sizes), None)] == rows_of_groups


def points(x: int, y: int, width: int, height: int) -> list[list[int]]:
    """The corners of a rectangle, clockwise from the upper left one."""
    return np.array(rectangle(x, y, width, height)).reshape(4, 2).tolist()


def test_labelme(exported):
    out = exported("labelme")
    held = read(out / "train/00000000.json")
    assert (held["imagePath"], held["imageHeight"], held["imageWidth"]) == ("00000000.png", HEIGHT, WIDTH)
    assert [shape["label"] for shape in held["shapes"]] == ["person", "car", "car"]
    assert [shape["points"] for shape in held["shapes"]] == [points(*box) for box in BOXES]
    assert {(shape["shape_type"], shape["group_id"]) for shape in held["shapes"]} == {("polygon", None)}
    assert (out / "labels.txt").read_text() == "car\nperson\nbicycle\n"


def thing(*rows_of_mask: str) -> ExportedThing:
    """A car on the pixels marked with #."""
    mask = np.array([[letter == "#" for letter in row] for row in rows_of_mask])
    encoded = mask_rle.encode(mask[None])
    return ExportedThing("car", 0.9, encoded.rles[0], int(encoded.areas[0]), tuple(encoded.boxes[0].tolist()))


def test_two_parts_of_a_thing_have_its_number_as_their_group_in_labelme():
    whole, parts = thing("##..", "##.."), thing("##.#", "##.#")
    shapes = list(annotation_tools._labelme_shapes(SimpleNamespace(things=[whole, parts, whole])))
    assert [shape["group_id"] for shape in shapes] == [None, 2, 2, None]
    assert [shape["points"] for shape in shapes[1:3]] == [points(0, 0, 2, 2), points(3, 0, 1, 2)]


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        ("joined", ["0 0 0 0.5 0 0.75 0 1 0 1 1 0.75 1 0.75 0 0.5 0 0.5 1 0 1"]),
        ("split", ["0 0 0 0.5 0 0.5 1 0 1", "0 0.75 0 1 0 1 1 0.75 1"]),
    ],
)
def test_two_parts_of_a_thing_are_one_line_or_two_in_yolo(parts, lines):
    sample = SimpleNamespace(width=4, height=2, things=[thing("##.#", "##.#")])
    plan = SimpleNamespace(classes=SimpleNamespace(things=("car",)), layout=SimpleNamespace(parts=parts))
    assert list(yolo.YoloSegment().lines(sample, plan)) == lines


def test_cvat(exported):
    root = ElementTree.parse(exported("cvat") / "train/annotations.xml").getroot()
    (image,) = root.iterfind("image")
    assert (image.get("id"), image.get("name"), image.get("width"), image.get("height")) == (
        "0",
        "00000000.png",
        "6",
        "4",
    )
    shapes = [(shape.get("label"), shape.get("z_order"), shape.get("points")) for shape in image]
    assert shapes == [
        ("person", "1", "3,0;5,0;5,4;3,4"),
        ("car", "2", "1,1;4,1;4,3;1,3"),  # in front of all
        ("car", "0", "0,2;2,2;2,4;0,4"),
    ]
    assert [label.text for label in root.iterfind("meta/task/labels/label/name")] == list(THINGS)


def test_runs_of_a_mask_in_cvat_go_row_by_row_and_begin_outside():
    """Things in two parts, or with a hole, are masks there."""
    mask = np.array([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    thing = ExportedThing("car", 0.9, mask_rle.encode(mask[None]).rles[0], 6, (0.0, 0.0, 6.0, 3.0))
    shape = ElementTree.fromstring(annotation_tools._cvat_shape(thing, 2))
    assert shape.tag == "mask" and shape.get("rle") == "1, 2, 6, 4, 5"
    assert [shape.get(side) for side in ("left", "top", "width", "height", "z_order")] == ["0", "0", "6", "3", "2"]


def test_a_hole_is_reached_from_the_corner_nearest_to_it():
    border, hole = [[0, 0], [6, 0], [6, 6], [0, 6]], [[4, 4], [4, 5], [5, 5], [5, 4]]
    line = rings.join_rings([np.array(border), np.array(hole)])
    assert line.tolist() == [*border[:3], *hole, hole[0], *border[2:]]


def test_a_hole_is_cut_from_the_smallest_part_around_it():
    mask = np.ones((9, 9), bool)
    mask[1:8, 1:8], mask[2:7, 2:7], mask[4, 4] = False, True, False  # a frame, and in it a block with a hole
    parts = rings.group_parts(rings.rings(mask))
    assert [[(ring.min(0).tolist(), ring.max(0).tolist()) for ring in part] for part in parts] == [
        [([0, 0], [9, 9]), ([1, 1], [8, 8])],
        [([2, 2], [7, 7]), ([4, 4], [5, 5])],
    ]


def test_label_studio(exported):
    out = exported("label-studio")
    (task,) = read(out / "tasks.json")
    assert task["data"]["image"] == "/data/local-files/?d=images/train/00000000.png"
    (prediction,) = task["predictions"]
    assert prediction["score"] == 0.6  # of the least sure instance
    first = prediction["result"][0]
    left, right = 50.0, 83.333333  # 3 and 5 of 6 pixels, in per cent
    assert first["value"]["points"] == [[left, 0], [right, 0], [right, 100], [left, 100]]
    assert first["value"]["polygonlabels"] == ["person"] and first["value"]["closed"] and first["score"] == 0.8
    assert (first["original_width"], first["original_height"]) == (WIDTH, HEIGHT)
    interface = ElementTree.parse(out / "config.xml")
    assert [label.get("value") for label in interface.iter("Label")] == list(THINGS)
    assert {first["from_name"], first["to_name"]} == {part.get("name") for part in interface.getroot()}


def test_tasks_of_every_split_are_in_one_list_of_label_studio():
    entries = {"train": [{"task": 1}, {"task": 2}], "val": [{"task": 3}]}
    plan = SimpleNamespace(splits=entries, classes=Classes((), (), ()))
    files = annotation_tools.LabelStudioFormat().shared_files(plan, SimpleNamespace(entries=entries.__getitem__))
    assert json.loads(b"".join(files["tasks.json"])) == [1, 2, 3]
    facts = {"name": "a", "split": "val", "things": (), "prompt": "a ball", "picture": lambda forms: ("jpg", b"x")}
    files, entry = annotation_tools.LabelStudioFormat().convert_sample(SimpleNamespace(**facts), None)
    data = {"image": "/data/local-files/?d=images/val/a.jpg", "id": "a", "prompt": "a ball", "split": "val"}
    assert [*files] == ["images/val/a.jpg"] and entry["task"]["data"] == data
    assert entry["task"]["predictions"][0]["score"] == 0 and not entry["task"]["predictions"][0]["result"]


def test_shards_hold_every_sample_of_a_split_once():
    asked = []
    samples = SimpleNamespace(views=lambda *places: asked.append(places) or iter(()))
    layout = SimpleNamespace(shard=2)
    plan = SimpleNamespace(splits={"train": 4, "val": 3}, layout=layout, tasks=set(), classes=Classes((), (), ()))
    tars = [name for name in wds.WebDatasetFormat().shared_files(plan, samples) if name.endswith(".tar")]
    assert tars == [f"{split}-00000{k}.tar" for split in ("train", "val") for k in (0, 1)]
    tables = [name for name in hf.ParquetFormat().shared_files(plan, samples) if name.endswith(".parquet")]
    assert tables == [f"data/{split}-0000{k}-of-00002.parquet" for split in ("train", "validation") for k in (0, 1)]
    assert asked == [(split, first, first + 2) for split in ("train", "val") for first in (0, 2)]


@pytest.mark.parametrize(
    ("stored", "asked", "forms", "form", "is_linked"),
    [
        ("jpg", "same", ("png", "jpg"), "jpg", True),
        ("png", "same", ("png", "jpg"), "png", True),
        ("png", "jpg", ("png", "jpg"), "jpg", False),
        ("jpg", "same", ("png",), "png", False),
        ("png", "same", ("jpg",), "jpg", False),
    ],
)
def test_a_picture_keeps_its_form_where_a_format_has_it(monkeypatch, stored, asked, forms, form, is_linked):
    made = object.__new__(format.SampleView)
    made.stored = SimpleNamespace(row=SimpleNamespace(files={"image": RowFile(f"images/a.{stored}", None)}))
    made.plan = SimpleNamespace(pictures=PictureSettings(image_format=asked, quality=80))
    made.image = "pixels"
    monkeypatch.setattr(format.SampleView, "link_file", lambda self, role: f"link of {role}")
    monkeypatch.setattr(format, "image_bytes", lambda *given: given)
    content = "link of image" if is_linked else ("pixels", form, 80)
    assert made.picture(forms) == (form, content) and PictureSettings() == PictureSettings(0.0, "same", 95)


@pytest.mark.parametrize("shards", [None, "shards"])
def test_a_file_in_a_shard_is_copied_and_one_of_a_folder_linked(tmp_path, monkeypatch, shards):
    made = object.__new__(format.SampleView)
    monkeypatch.setattr(format.SampleView, "read", lambda self, role: b"bytes")
    files = {"image": ("images/a.png", "stored")}
    made.stored = SimpleNamespace(row=SimpleNamespace(files=files), shards=shards, folder=tmp_path)
    assert made.link_file("image") == (b"bytes" if shards else format.Linked(tmp_path / "images/a.png", "stored"))


def test_persons_without_joints_or_of_a_low_score_are_left_out():
    made = object.__new__(format.SampleView)
    row = {"keypoints": [1, 2, 2], "keypoint_scores": [0.5], "area": 4, "bbox": [0, 0, 2, 2]}
    people = [row | {"num_keypoints": count, "score": score} for count, score in ((1, 0.5), (0, 0.9), (2, 0.49))]
    chosen = {"labels": {"pose": "pose"}, "people": ("person",), "pictures": PictureSettings(least_score=0.5)}
    made.plan = SimpleNamespace(**chosen)
    made.stored = SimpleNamespace(row=SimpleNamespace(labels={"pose": people}))
    (person,) = made.people
    assert (person.name, person.score, person.area, person.joints.tolist()) == ("person", 0.5, 4.0, [[1, 2, 2]])


def test_mmseg(exported):
    out = exported("mmseg")
    assert pixels(out / "annotations/train/00000000.png") == LABELS
    config = runpy.run_path(str(out / "dataset.py"))
    shown = np.array(Image.open(out / "annotations/train/00000000.png").getpalette()).reshape(-1, 3)
    assert config["metainfo"]["palette"] == shown[:6].tolist()
    assert config["metainfo"]["classes"] == ("background", *MAPS, *THINGS) and config["num_classes"] == 6
    assert config["datasets"]["train"]["reduce_zero_label"] is False


@pytest.mark.parametrize("rows_of_mask", [("###.#", "#.#..", "###.."), ("###..", "#.#..", "###.#")])
def test_a_thing_with_a_hole_is_run_lengths_in_coco_and_one_polygon_in_lvis_wherever_the_hole_is(rows_of_mask):
    framed, plain = thing(*rows_of_mask), thing("##.", "...", "..#")
    held = coco.segmentation(framed, joins_holes=False)
    assert isinstance(held["counts"], list) and (mask_rle.decode(held) == framed.mask).all()
    (polygon,) = coco.segmentation(framed, joins_holes=True)
    corners = np.array(polygon).reshape(-1, 2)
    following = np.roll(corners, -1, axis=0)
    shoelace = (corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]).sum() / 2
    assert abs(shoelace) == 9 == framed.area  # pixels of the frame and of the other part, without the hole
    parts = [[0, 0, 2, 0, 2, 1, 0, 1], [2, 2, 3, 2, 3, 3, 2, 3]]
    assert coco.segmentation(plain, joins_holes=False) == coco.segmentation(plain, joins_holes=True) == parts


def test_convert_tells_of_splits_whose_types_load_dataset_cannot_guess():
    def limits(**splits):
        held = {split: [{"objects": {"score": [0.5]}, "people": {"score": [*seen]}}] for split, seen in splits.items()}
        plan, samples = SimpleNamespace(splits=held), SimpleNamespace(entries=lambda split: iter(held[split]))
        return list(hf.ImageFolderFormat().find_limits(plan, samples))

    (told,) = limits(train=[0.9], val=[], test=[])
    assert told.startswith("hf: val and test without any people") and "data_dir='.../hf/val'" in told
    assert limits(train=[], val=[]) == limits(train=[0.9], val=[0.8]) == limits(train=[]) == []  # one type in all


def test_texts_of_wds_are_written_in_their_own_letters():
    view = {"name": "00000000", "picture": lambda forms: ("png", b"x"), "prompt": "eine Möwe", "width": 6, "height": 4}
    samples = SimpleNamespace(views=lambda *places: [SimpleNamespace(stored=SimpleNamespace(seed=7), **view)])
    classes = Classes(("Möwe",), (), ("Möwe",))
    plan = SimpleNamespace(tasks={"semantic"}, classes=classes, layout=SimpleNamespace(shard=2))
    written = wds.table_files(plan)
    assert written["id2label.json"] == ['{"0": "background", "1": "Möwe"}'.encode()]
    assert '"Möwe"'.encode() in written["classes.json"][0]
    plan.tasks = set()
    record = '{"id": "00000000", "prompt": "eine Möwe", "seed": 7, "width": 6, "height": 4}'
    assert dict(wds._files(plan, samples, "train", 0)) == {"00000000.png": b"x", "00000000.json": record.encode()}
