"""What a reviewer corrects in the gallery: exports and trainings read it, the run itself stays as it is."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rendered import write_run

from datasetdm_fast import open_run
from datasetdm_fast.convert import main as convert
from datasetdm_fast.drop import main as drop
from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.gallery.review import Review
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.corrections import CORRECTIONS, Correction, format_corrections, read_corrections
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.training.readers import open_data

SIZE = 48
BOX = (6, 12, 30, 40)  # x0, y0, x1, y1


@pytest.fixture
def run(tmp_path):
    """A run of four samples. Of the last (a person, a cone, a cube) the cone is deleted and the person called a ring;
    of the third a region is ignored.
    """
    write_run(tmp_path / "run", 4, SIZE)
    corrections = {
        3: Correction(removed=(("instance", 1),), renamed=(("instance", 0, "ring"),)),
        2: Correction(ignored=(BOX,)),
    }
    Review(tmp_path / "run").correct(corrections)
    assert read_corrections(tmp_path / "run") == corrections
    return tmp_path / "run"


def corrected(run) -> tuple[list, np.ndarray]:
    """Classes of the last sample as they should be, and the instances of the third that the region leaves."""
    third = open_run(run)[2].instances
    x0, y0, x1, y1 = BOX
    shares = third.masks[:, y0:y1, x0:x1].sum((1, 2)) / third.masks.sum((1, 2))
    return ["ring", "cube"], shares <= 0.5


def test_exports_have_the_corrected_labels(run, tmp_path, capsys):
    names, is_left = corrected(run)
    assert convert([str(run), "--to", "coco,voc", "--out", str(tmp_path / "out")]) == 0
    assert "corrections of 2 samples are applied" in capsys.readouterr().err
    source = open_data(f"coco:{tmp_path / 'out/coco'}", SIZE, tasks=["instance"])
    assert [source.thing_classes[k] for k in source[3].mask_classes] == names
    assert (source[2].masks == open_run(run)[2].instances.masks[is_left]).all() and not is_left.all()
    maps = tmp_path / "out/voc/VOCdevkit/VOC2012/SegmentationClass"
    x0, y0, x1, y1 = BOX
    labels = np.asarray(Image.open(maps / "00000002.png"))
    assert (labels[y0:y1, x0:x1] == 255).all() and (labels != 255).sum() == SIZE * SIZE - (x1 - x0) * (y1 - y0)
    assert 255 not in np.asarray(Image.open(maps / "00000001.png"))
    assert audit(run).findings == []  # the run has not changed
    Review(run).correct({3: Correction(removed=(("instance", 0),))})
    assert convert([str(run), "--to", "coco,voc", "--out", str(tmp_path / "out")]) == 2
    assert "it holds an export of other samples" in capsys.readouterr().err


def test_an_export_tells_the_corrections_of_its_samples_alone(run, tmp_path, capsys):
    corrected(run)
    assert drop([str(run), "00000002", "--quiet"]) == 0
    assert convert([str(run), "--to", "coco", "--out", str(tmp_path / "out")]) == 0
    assert "corrections of 1 sample are applied" in capsys.readouterr().err


def test_joints_go_with_the_person_that_is_corrected(run, tmp_path):
    """A person that a reviewer had deleted stayed in files of joints, in which no reviewer can delete it."""
    row, tables = open_run(run)[3].row, open_run(run).document["labels"]
    (person,) = row.labels["pose"]
    assert person["box_from"] == "instance" and person["bbox"] == row.labels["instance"][0]["bbox"]
    x, y, width, height = map(int, person["bbox"])
    region = (x, y, x + width + 1, y + height + 1)
    for correction, number in (
        (Correction(removed=(("instance", 0),)), 0),
        (Correction(renamed=(("instance", 0, "ring"),)), 0),
        (Correction(renamed=(("instance", 0, "person"),)), 1),
        (Correction(removed=(("instance", 1),)), 1),
        (Correction(ignored=(region,)), 0),
        (Correction(ignored=((0, 0, 2, 2),)), 1),
    ):
        assert len(correction.correct_row(row, tables).labels["pose"]) == number
    alone = replace(row, labels={**row.labels, "pose": [{**person, "box_from": "joints"}]})
    for correction, number in (
        (Correction(removed=(("instance", 0),)), 1),
        (Correction(ignored=(region,)), 0),
        (Correction(ignored=((0, 0, 2, 2),)), 1),
    ):
        assert len(correction.correct_row(alone, tables).labels["pose"]) == number
    assert convert([str(run), "--to", "coco,yolo-pose", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    found = json.loads((tmp_path / "out/coco/annotations/person_keypoints_train2017.json").read_text())["annotations"]
    assert 3 not in {item["image_id"] for item in found}
    assert (tmp_path / "out/yolo-pose/labels/train/00000003.txt").read_text() == ""


def test_an_export_is_of_the_regions_that_were_ignored(run, tmp_path, capsys):
    line = [str(run), "--to", "coco", "--out", str(tmp_path / "out"), "--quiet"]
    for side, code in ((8, 0), (8, 0), (9, 2)):
        Review(run).correct({3: Correction(ignored=((0, 0, side, side),))})
        assert convert(line) == code
    assert "it holds an export of other samples" in capsys.readouterr().err


def test_corrected_samples_are_truth_for_a_training(run):
    Review(run).change({"00000000": "bad", "00000001": "good"})
    names, is_left = corrected(run)
    source = open_data(f"run:{run}[corrected]", SIZE)
    assert [item.id for item in source] == ["00000001", "00000002", "00000003"]
    assert [source.thing_classes[k] for k in source[2].mask_classes] == names
    x0, y0, x1, y1 = BOX
    third = source[1]
    assert (third.semantic[y0:y1, x0:x1] == 255).all() and len(third.masks) == is_left.sum()
    assert third.crowds[-1][y0:y1, x0:x1].all() and third.crowds[-1].sum() == (x1 - x0) * (y1 - y0)
    assert third.crowd_classes[-1] == EVERY_CLASS
    assert (source[0].masks == open_run(run)[1].instances.masks).all()  # whatever their scores


def test_class_maps_follow_the_corrected_instances(run, tmp_path):
    sample = open_run(run)[3]
    before, (person, cone, _) = sample.semantic.labels, sample.instances.masks
    numbers = {name: number for number, name in enumerate(sample.semantic.classes)}
    wanted = before.copy()
    wanted[person & (before == numbers["person"])], wanted[cone & (before == numbers["cone"])] = numbers["ring"], 255
    assert (wanted == 255).any() and (wanted == numbers["ring"]).any() and (wanted == numbers["cube"]).any()
    assert (open_data(f"run:{run}[corrected]", SIZE)[1].semantic == wanted).all()
    assert convert([str(run), "--to", "mmseg", "--task", "semantic", "--out", str(tmp_path / "out")]) == 0
    written = np.asarray(Image.open(tmp_path / "out/mmseg/annotations/train/00000003.png"))
    assert (written == np.where(wanted == 255, 255, wanted + 1)).all()  # an export counts classes from 1 on


def test_a_class_map_keeps_what_another_instance_shows_as_well():
    masks = np.zeros((3, 2, 4), bool)
    masks[0, :, :2], masks[1, :, 1:3], masks[2, 0, 3] = True, True, True  # two of one ball, and a ring
    rles = mask_rle.encode(masks).rles
    record = [{"segmentation": rle, "category_id": number} for rle, number in zip(rles, (1, 1, 2))]
    row, tables = Row(None, {}, labels={"instance": record}), {"instance": {"classes": ["ball", "ring"]}}
    labels, names = np.array([[5, 5, 5, 7], [5, 5, 9, 255]], np.uint8), {5: "ball", 7: "ring", 9: "wall"}

    def corrected(names=names, **changes):
        return Correction(**changes).correct_map(labels, names, row, tables).tolist()

    assert corrected() == labels.tolist()
    assert corrected(removed=(("instance", 0),)) == [[255, 5, 5, 7], [255, 5, 9, 255]]
    assert corrected(removed=(("instance", 1),)) == [[5, 5, 255, 7], [5, 5, 9, 255]]
    renamed = (("instance", 2, "ball"), ("instance", 1, "dog"), ("instance:b", 0, "ring"))
    assert corrected(renamed=renamed) == [[5, 5, 5, 5], [5, 5, 9, 255]]
    assert corrected({5: "ball", 9: "wall"}, renamed=(("instance", 0, "ring"),))[0] == [255, 5, 5, 7]  # of no number
    assert corrected(renamed=(("instance", 0, "ring"),)) == [[7, 5, 5, 7], [7, 5, 9, 255]]
    assert corrected(renamed=(("instance", 1, "ring"),)) == [[5, 5, 7, 7], [5, 5, 9, 255]]  # in either order
    walls, of_walls = np.zeros((2, 4), np.uint8), {0: "wall", 7: "ring"}  # a map without balls
    assert not Correction(renamed=(("instance", 0, "ring"),)).correct_map(walls, of_walls, row, tables).any()
    row.labels["instance:b"], tables["instance:b"] = list(record), tables["instance"]
    assert corrected(removed=(("instance", 0),)) == [[255, 5, 5, 7], [255, 5, 9, 255]]  # also of a label of others
    masks[0, 0, 0] = False  # the map is a pixel larger than the mask
    row.labels["instance"][0] = record[0] | {"segmentation": mask_rle.encode(masks).rles[0]}
    assert corrected(renamed=(("instance", 0, "ring"),)) == [[255, 5, 5, 7], [7, 5, 9, 255]]
    assert corrected(ignored=((2, 1, 9, 9),)) == [[5, 5, 5, 7], [5, 5, 255, 255]]


def test_a_run_that_nobody_corrected_is_refused_as_truth(run):
    shutil.rmtree(run / "review")
    with pytest.raises(Refused, match="no sample was corrected or marked as good") as stop:
        open_data(f"run:{run}[corrected]", SIZE)
    assert "--serve" in stop.value.remedy


@pytest.mark.parametrize(
    "value",
    [
        {"removed": [["instance", "1"]]},
        {"removed": [9]},
        {"renamed": 3},
        {"ignored": [[5, 5, 5, 9]]},
        {"ignored": [[5, 5, 9, 5]]},
        {"ignored": [[1, 2, 3]]},
        {"removed": [["instance", 1, 2]]},
        {"renamed": [["instance", "1", "ring"]]},
        {"other": []},
        [],
    ],
)
def test_what_is_no_correction_is_refused(run, value):
    (run / CORRECTIONS).write_text(json.dumps({"00000000": value}))
    with pytest.raises(Refused, match="corrections"):
        read_corrections(run)


@pytest.mark.parametrize("id", ["a mug.jpg", "-1", ""])
def test_a_correction_of_no_sample_is_refused_by_its_id(run, id):
    (run / CORRECTIONS).write_text(json.dumps({"00000000": {}, id: {}}))
    with pytest.raises(Refused, match=f"corrections file .*{id!r} is no number of a sample"):
        read_corrections(run)


def test_a_region_is_cut_to_the_picture_and_half_of_a_thing_stays():
    told = {
        "removed": [["instance", 1]],
        "renamed": [["instance:a", 0, "ring"]],
        "ignored": [[-5, -3, 2, 1], [3, 0, 9, 9]],
    }
    correction = Correction.parse(told)
    assert correction.facts() == told and Correction.parse({}).facts() == {} == Correction().facts()
    wanted = np.zeros((4, 5), bool)
    wanted[:1, :2], wanted[:, 3:] = True, True
    assert (correction.region((4, 5)) == wanted).all() and not Correction().region((4, 5, 3)).any()
    assert not Correction(ignored=((-9, -9, -5, 3),)).region((4, 5)).any()
    assert Correction.parse({"ignored": [[0, 0, 1, 1]]}).region((4, 5)).sum() == 1
    masks = np.zeros((3, 4, 5), bool)
    masks[0, 3, 2:4], masks[1, 3, 1:3], masks[2, 3, 2:] = True, True, True  # half, none and most of it are ignored
    record = [{"segmentation": rle, "category_id": 1} for rle in mask_rle.encode(masks).rles]
    row, table = Row(None, {}, labels={"instance": record}), {"instance": {"classes": ["ball", "ring"]}}

    def places(**changes):
        return Correction(**changes).correct_row(row, table).labels["instance"]

    ignored = ((3, 0, 9, 9),)
    assert places(ignored=ignored) == [record[0], record[1]]
    assert places(removed=(("instance", 0), ("instance:b", 1))) == [record[1], record[2]]
    renamed = places(renamed=(("instance", 2, "ring"), ("instance", 1, "dog"), ("instance:b", 0, "ring")))
    assert [item["category_id"] for item in renamed] == [1, 1, 2]
    joints = [(1, 5), (6, 5), (3, 2), (3, 8), (2, 3), (5, 7)]  # beyond each side of a region, and in two of its corners
    people = [{"keypoints": [x, y, 2]} for x, y in joints]
    of_people = Row(None, {}, labels={"pose": people})
    assert Correction(ignored=((2, 3, 6, 8),)).correct_row(of_people, {}).labels["pose"] == people[:4]
    assert [*json.loads(format_corrections({3: correction, 1: correction}))] == ["00000001", "00000003"]


def test_an_export_from_before_a_correction_is_another(run, tmp_path, capsys):
    line = [str(run), "--to", "coco", "--out", str(tmp_path / "out")]
    assert convert(line) == 0 and convert(line) == 0
    Review(run).correct({2: Correction()})
    capsys.readouterr()
    assert convert(line) == 2 and "another split" in capsys.readouterr().err
