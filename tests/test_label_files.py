"""What stands in label files at the edges of their ranges: rounding, saturation, one pixel, nothing at all."""

import io
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from datasetdm_fast.data import DepthMap, Instances, Keypoints, Request, Sample, SemanticMap
from datasetdm_fast.engine.labels import (
    LABEL_KINDS,
    check_palette,
    class_tables,
    label_files,
    mean_certainty,
    mean_score,
    number_classes,
    pictures,
    round_float,
    with_palette,
)
from datasetdm_fast.engine.labels import pose as pose_labels
from datasetdm_fast.engine.labels import semantic as semantic_labels
from datasetdm_fast.engine.labels.class_tables import colour
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import images

TABLES = {
    "semantic": {"classes": ["wall", "ball"]},
    "instance": {"classes": ["ball", "cone"], "size": [4, 4]},
    "pose": {"joints": ["head", "neck", "hand"], "limbs": [[0, 1]], "size": [16, 16], "widened": 0.125},
    "depth": {"max_depth": 4.0, "unit": "millimetre"},
    "open-vocabulary": {"classes": ["background", "ball"]},
}


def encoded(task, label, labels=None):
    """Pixels by role, and the record."""
    files, record = LABEL_KINDS[task].encode(label, labels or {}, TABLES[task])
    return {role: np.array(Image.open(io.BytesIO(content))) for role, content in files.items()}, record


def found_wrong(task, pixels, record, side=4):
    return list(LABEL_KINDS[task].check(record, pixels, TABLES[task], (side, side)))


def semantic(labels, confidence=1.0):
    labels = np.asarray(labels, np.uint8)
    return SemanticMap(labels, np.broadcast_to(np.float32(confidence), labels.shape), ("wall", "ball"))


@pytest.mark.parametrize(
    ("confidence", "stored"),
    [(0, 0), (0.0019, 0), (0.00197, 1), (0.498, 127), (0.5, 128), (0.9979, 254), (0.9981, 255), (1, 255)],
)
def test_a_confidence_is_rounded_to_the_nearest_of_256_levels(confidence, stored):
    pixels, record = encoded("semantic", semantic(np.zeros((4, 4)), confidence))
    assert (pixels["confidence"] == stored).all() and record["mean_confidence"] == round(stored / 255, 4)


@pytest.mark.parametrize(("confidence", "stored"), [(-0.5, 0), (1.5, 255), (float("nan"), 0), (float("inf"), 255)])
def test_a_confidence_outside_its_range_is_the_nearest_inside(confidence, stored):
    assert (encoded("semantic", semantic(np.zeros((4, 4)), confidence))[0]["confidence"] == stored).all()


def test_a_label_map_counts_every_number_it_holds():
    labels = np.zeros((4, 4))
    labels[3, 3], labels[0, :2] = 1, 255
    pixels, record = encoded("semantic", semantic(labels))
    assert record == {"pixels": {"0": 13, "1": 1, "255": 2}, "mean_confidence": 1.0}
    assert found_wrong("semantic", pixels, record) == []  # 255 is ignored, and no class


def test_a_label_map_is_read_as_it_was_written():
    labels = np.arange(16).reshape(4, 4) % 2
    pixels, record = encoded("semantic", semantic(labels, 0.4))
    label = LABEL_KINDS["semantic"].decode(pixels, record, TABLES["semantic"])
    assert (label.labels == labels).all() and label.classes == ("wall", "ball")
    assert label.confidence.dtype == np.float32 and (label.confidence == np.float32(102 / 255)).all()


def test_maps_of_words_keep_their_confidence():
    label = semantic(np.arange(16).reshape(4, 4) % 2, 0.4)
    for task, role in (("open-vocabulary", "open_vocabulary"), ("attention", "attention")):
        stored, table = LABEL_KINDS[task], LABEL_KINDS[task].table(None, 4, ("ball",))
        files, record = stored.encode(label, {}, table)
        pixels = {name: np.array(Image.open(io.BytesIO(content))) for name, content in files.items()}
        assert list(files) == [role, f"{role}_confidence"] and record["mean_confidence"] == 0.4
        assert table.get("ignore") == (255 if task == "attention" else None)
        assert (stored.decode(pixels, record, table).confidence == np.float32(102 / 255)).all()
        assert list(stored.check(record, pixels, table, (4, 4))) == [] and stored.certainty(record) == 0.4
        pixels[f"{role}_confidence"] += 1
        assert "the mean confidence is 0.4039" in list(stored.check(record, pixels, table, (4, 4)))[0]


def test_samples_can_be_sorted_by_what_their_records_say():
    records = {
        "semantic": ({"mean_confidence": 0.4, "pixels": {}}, {"confidence": 0.4}),
        "depth": ({"min": 1.5, "mean": 2.0, "max": 3.25}, {"nearest, m": 1.5, "farthest, m": 3.25}),
        "pose": ([{"num_keypoints": 2}, {"num_keypoints": 0}, {"num_keypoints": 1}], {"people": 2}),
    }
    for task, (record, figures) in records.items():
        assert LABEL_KINDS[task].figures(record) == figures
    assert not LABEL_KINDS["instance"].figures([]) and not LABEL_KINDS["attention"].figures({"pixels": {}})


def test_maps_of_words_agree_on_the_certain_pixels_by_the_words_that_both_know():
    def words(labels, *names):
        return SemanticMap(np.uint8(labels), np.ones((2, 2), np.float32), names)

    read = words([[0, 1], [2, 255]], "background", "ball", "cube")
    shares = (([[0, 2], [1, 0]], 1.0), ([[0, 2], [2, 0]], 0.6667), ([[0, 0], [1, 0]], 0.6667), ([[255] * 2] * 2, None))
    for labels, share in shares:
        assert semantic_labels.agreement(read, words(labels, "wall", "cube", "ball")) == share
    beyond = words([[1, 2], [3, 0]], "background", "wall", "ball", "cube")  # to the words, a wall is background
    assert semantic_labels.agreement(read, beyond) == 1
    assert semantic_labels.agreement(read, words([[0, 1], [1, 0]], "wall", "dog")) is None
    others = {
        "semantic": words([[2, 0], [0, 0]], "wall", "cube", "ball"),
        "open-vocabulary": words([[0, 0]] * 2, "none"),
    }
    _, record = LABEL_KINDS["attention"].encode(read, others, {"classes": ["background", "ball", "cube"]})
    assert record["agreement"] == {"semantic": 0.0}, "they agree nowhere, and the other map has none of the words"


def test_no_class_of_a_map_has_the_number_of_ignored_pixels():
    names = [f"thing {k}" for k in range(255)]
    assert max(number_classes({"semantic": {"classes": names}})["labels"]["semantic"]["numbers"]) == 254
    things = {"classes": names[:1], "size": [4, 4]}  # a map whose first class is a thing begins with the background
    with pytest.raises(Refused, match="show 256 classes in all, an 8-bit map holds 255"):
        number_classes({"semantic": {"classes": names}, "instance": things})
    few = number_classes({"semantic": {"classes": names[:254]}, "instance": things})
    assert few["labels"]["semantic"]["numbers"] == [*range(1, 255)] and few["classes"][0] == "background"


def test_numbers_beyond_the_table_of_colours_have_hues_by_the_golden_ratio():
    for number in range(60, 66):
        turn, grey, bright = (
            number * 0.618033988749895 % 1,
            1 - 0.55 - 0.35 * (number % 3) / 2,
            0.95 - 0.25 * (number % 2),
        )
        pure = [min(max(abs((6 * turn + start) % 6 - 3) - 1, 0), 1) for start in (0, 4, 2)]  # red, green and blue
        wanted = [255 * bright * (grey + (1 - grey) * part) for part in pure]
        assert colour(number) == pytest.approx(wanted, abs=0.6)


def test_label_maps_have_the_colours_of_a_known_set_where_it_has_their_classes():
    tables = {"semantic": {"classes": ["background", "cat", "diningtable"]}, "depth": {"max_depth": 4.0}}
    found = with_palette(tables, "voc")["semantic"]
    label = SemanticMap(np.full((4, 4), 2, np.uint8), np.ones((4, 4), np.float32), tuple(found["classes"]))
    files, _ = LABEL_KINDS["semantic"].encode(label, {}, found)
    palette = np.array(Image.open(io.BytesIO(files["semantic"])).getpalette()).reshape(256, 3).tolist()
    assert palette[:3] == [[0, 0, 0], [64, 0, 0], [192, 128, 0]] and palette[255] == [224, 224, 192]
    assert [class_tables.colour_in(name, "background", 3) for name in ("voc", "cityscapes", "coco")] == [(0, 0, 0)] * 3
    assert class_tables.colour_in("ours", "background", 3) == colour(3)
    assert with_palette(tables, "ours") == tables and with_palette(tables, "voc")["depth"] == tables["depth"]
    ours = LABEL_KINDS["semantic"].encode(label, {}, tables["semantic"])[0]["semantic"]
    assert Image.open(io.BytesIO(ours)).getpalette()[3:6] == list(colour(1))
    with pytest.raises(Refused, match="--palette cityscapes: has no colour for 'cat' of semantic"):
        with_palette(tables, "cityscapes")


def test_label_maps_have_the_colours_of_an_own_table():
    tables = {"semantic": {"classes": ["background", "cat", "lorry"]}, "depth": {"max_depth": 4.0}}
    own = class_tables.parse("name,colour\ncat,1 2 3\nlorry,0 0 142\n")
    found = number_classes(with_palette(tables, "table", own))["labels"]["semantic"]
    check_palette(found)
    label = SemanticMap(np.full((4, 4), 2, np.uint8), np.ones((4, 4), np.float32), tuple(found["classes"]))
    files, _ = LABEL_KINDS["semantic"].encode(label, {}, found)
    palette = np.array(Image.open(io.BytesIO(files["semantic"])).getpalette()).reshape(256, 3).tolist()
    assert palette[:4] == [[0, 0, 0], [1, 2, 3], [0, 0, 142], list(colour(3))]
    kept = class_tables.of_rows(class_tables.rows_of(own, ("cat", "lorry"), has_colours=True))
    assert with_palette(tables, "table", kept) == with_palette(tables, "table", own)
    with pytest.raises(Refused, match="--palette table: has no colour for 'lorry' of semantic"):
        with_palette(tables, "table", class_tables.parse("name,colour\ncat,1 2 3\nlorry,\n"))
    with pytest.raises(Refused, match="--palette table: this run has no table of class words"):
        with_palette(tables, "table")
    for colours in ([[1, 2]] * 3, [[1, 2, 3]], [[1, 2, 300]] * 3):
        with pytest.raises(ValueError, match="three numbers"):
            check_palette(found | {"colours": colours})


def test_a_map_shows_the_classes_that_fill_enough_of_it():
    record = {"pixels": {"0": 10, "1": 5, "255": 9}}
    shown = [list(LABEL_KINDS["semantic"].words(record, TABLES["semantic"], least)) for least in (5, 6, 11)]
    assert shown == [["wall", "ball"], ["wall"], []]


def test_the_card_tells_the_share_of_every_class():
    card = LABEL_KINDS["semantic"]
    lines = "\n".join(card.section(TABLES["semantic"], card.count({"pixels": {"0": 3, "255": 1}}))).splitlines()
    assert lines[0] == "## Semantic classes" and lines[2].startswith("| number | class |")
    assert lines[4:6] == ["| 0 | wall | 75.00% |", "| 1 | ball | 0.00% |"]
    assert list(card.section(TABLES["semantic"], {})) == []


def test_a_number_beyond_the_classes_is_found():
    for task, role in (("semantic", "semantic"), ("open-vocabulary", "open_vocabulary")):
        for number, count in ((1, 0), (2, 1), (254, 1)):
            labels = np.zeros((4, 4))
            labels[0, 0] = number
            pixels, record = encoded(task, semantic(labels))
            wrong = found_wrong(task, pixels, record)
            assert len(wrong) == count and (
                not count or f"the number {number}, which none of its 2 classes" in wrong[0]
            )
            pixels[role] = 1 - pixels[role].clip(max=1)
            assert "the ledger says" in found_wrong(task, pixels, record)[0]


def test_a_confidence_map_that_was_exchanged_is_found():
    pixels, record = encoded("semantic", semantic(np.zeros((4, 4)), 0.5))
    pixels["confidence"] = pixels["confidence"] + 1
    assert found_wrong("semantic", pixels, record) == ["the mean confidence is 0.5059, the ledger says 0.502"]


def test_a_depth_is_stored_to_the_nearest_millimetre_and_saturates():
    metres = np.array(
        [[0.0004, 0.0006, 1.2344, 1.2346], [65.5349, 65.5351, 65.536, 1000], [-1, 0, 4, 2.5], [2, 2, 2, 2]]
    )
    pixels, record = encoded("depth", DepthMap(metres.astype(np.float32), 4.0))
    assert pixels["depth"].tolist() == [
        [0, 1, 1234, 1235],
        [65535, 65535, 65535, 65535],
        [0, 0, 4000, 2500],
        [2000, 2000, 2000, 2000],
    ]
    known = pixels["depth"][pixels["depth"] > 0]  # 0 is what is not known
    assert record == {"min": 0.001, "mean": round(known.mean() / 1000, 3), "max": 65.535}
    assert found_wrong("depth", pixels, record) == [] and found_wrong("depth", pixels, record | {"max": 65.534})
    decoded = LABEL_KINDS["depth"].decode(pixels, record, TABLES["depth"])
    assert decoded.metres.dtype == np.float32 and decoded.metres[0, 2] == np.float32(1.234) and decoded.max_depth == 4.0


def instances(*boxes, scores=None, classes=None):
    masks = np.zeros((len(boxes), 4, 4), bool)
    for mask, (top, left, bottom, right) in zip(masks, boxes):
        mask[top:bottom, left:right] = True
    scores = np.array([0.5] * len(boxes) if scores is None else scores, np.float32)
    return Instances(masks, np.array(classes or [0] * len(boxes), np.int64), scores, ("ball", "cone"))


def test_an_instance_of_one_pixel_has_a_box_of_one_pixel():
    _, (item,) = encoded("instance", instances((3, 2, 4, 3), classes=[1]))
    assert (item["area"], item["bbox"], item["category_id"], item["score"]) == (1, [2.0, 3.0, 1.0, 1.0], 2, 0.5)
    label = LABEL_KINDS["instance"].decode({}, [item], TABLES["instance"])
    assert np.argwhere(label.masks[0]).tolist() == [[3, 2]] and label.class_ids.tolist() == [1]


def test_data_sets_of_torch_give_classes_the_numbers_of_files():
    table = {"classes": ["ball", "cone"], "size": [4, 4], "numbers": [5, 2]}
    things = instances((0, 1, 3, 3), (3, 3, 4, 4), classes=[1, 0], scores=[0.5, 0.75])
    arrays = LABEL_KINDS["instance"].arrays(things, table)
    assert arrays["labels"].tolist() == [2, 5] and arrays["scores"].tolist() == [0.5, 0.75]
    assert arrays["boxes"].tolist() == [[1, 0, 3, 3], [3, 3, 4, 4]]  # left, top, right and bottom
    pixels = LABEL_KINDS["semantic"].arrays(
        semantic([[0, 1], [255, 1]]), {"classes": ["wall", "ball"], "numbers": [5, 2]}
    )
    assert pixels.tolist() == [[5, 2], [255, 2]] and pixels.dtype == np.int64
    people = LABEL_KINDS["pose"].arrays(person((1, 2), (3, 4), (0, 0), visibility=(2, 1, 0)), TABLES["pose"])
    assert people["keypoints"].tolist() == [[[1, 2, 2], [3, 4, 1], [0, 0, 0]]] and people["scores"].tolist() == [0.5]


def test_pictures_of_a_run_in_jpeg_are_of_quality_95_with_all_their_colours():
    pictures_of = [label_files.image_bytes(np.zeros((16, 16, 3), np.uint8), "jpg", *quality) for quality in ((), (50,))]
    usual, half = (Image.open(io.BytesIO(content)) for content in pictures_of)
    assert JpegImagePlugin.get_sampling(usual) == 0 and usual.quantization[0][0] == 2 and half.quantization[0][0] == 16


def test_what_is_no_number_of_a_class_is_read_as_ignored():
    pixels = {"semantic": np.uint8([[5, 2], [0, 255]]), "confidence": np.full((2, 2), 51, np.uint8)}
    read = LABEL_KINDS["semantic"].decode(pixels, {}, {"classes": ["wall", "ball"], "numbers": [5, 2]})
    assert read.labels.tolist() == [[0, 1], [255, 255]] and (read.confidence == np.float32(0.2)).all()


def test_an_image_without_instances_has_none_of_its_own_size():
    _, record = encoded("instance", instances())
    assert record == [] and LABEL_KINDS["instance"].decode({}, record, TABLES["instance"]).masks.shape == (0, 4, 4)


def test_scores_are_stored_with_six_digits_and_coordinates_with_three():
    _, (item,) = encoded("instance", instances((0, 0, 4, 4), scores=[0.12345678]))
    assert item["score"] == 0.123457
    assert round_float(1.23449) == 1.234 and round_float(1.2346) == 1.235
    assert str(round_float(-0.0001)) == "0.0"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"area": 3}, "the ledger says 3"),
        ({"bbox": [0.0, 0.0, 2.0, 1.0]}, "the ledger says 4"),
        ({"score": 0}, None),
        ({"score": 1}, None),
        ({"score": 1.0001}, "the score 1.0001"),
        ({"score": -0.0001}, "the score -0.0001"),
        ({"category_id": 0}, "the category 0"),
        ({"category_id": 2}, None),
        ({"category_id": 3}, "the category 3"),
    ],
)
def test_a_record_of_an_instance_is_held_to_its_mask(changes, said):
    _, (item,) = encoded("instance", instances((0, 0, 2, 2)))
    wrong = found_wrong("instance", {}, [item | changes])
    assert len(wrong) == bool(said) and all(said in line for line in wrong)
    assert "mask 1 is [4, 4], expected [5, 5]" in found_wrong("instance", {}, [item, item], side=5)[1]


def test_runs_that_could_be_shorter_are_found():
    _, (item,) = encoded("instance", instances((0, 0, 4, 4)))
    item["segmentation"] = {"size": [4, 4], "counts": [0, 4, 0, 12]}
    assert found_wrong("instance", {}, [item]) == ["mask 0 is not written in the shortest way"]


def person(*joints, visibility=(2, 2, 2), score=0.5):
    points = np.array([[*joint, 0.25] for joint in joints], np.float32)[None]
    return Keypoints(points, np.array([visibility]), np.array([score], np.float32), ("head", "neck", "hand"), ((0, 1),))


def test_a_joint_that_is_not_seen_has_no_place_and_no_part_in_the_box():
    label = person((1.75, 2.5), (0.4999999, 4.0), (100, 100), visibility=(2, 1, 0), score=0.1234567)
    _, (item,) = encoded("pose", label)
    assert item["keypoints"] == [1.25, 2.0, 2, 0.0, 3.5, 1, 0, 0, 0] and item["num_keypoints"] == 2
    assert item["bbox"] == [0.0, 0.5, 3.75, 5.5] and item["area"] == 20.625  # two pixels wider on each side
    assert item["score"] == 0.123457 and item["keypoint_scores"] == [0.25] * 3
    assert found_wrong("pose", {}, [item], 16) == []
    read = LABEL_KINDS["pose"].decode({}, [item], TABLES["pose"])
    assert read.points[0, :, :2].tolist() == [[1.75, 2.5], [0.5, 4.0], [0, 0]] and read.visibility.tolist() == [
        [2, 1, 0]
    ]
    assert encoded("pose", person((1, 1), (2, 2), (3, 3), visibility=(0, 0, 0))) == ({}, [])


PEOPLE = {**TABLES["pose"], "size": [40, 60], "widened": pose_labels.WIDENED}


def extent(label, labels=None, table=PEOPLE):
    """Box, area and where they are from of every person, of which an audit finds nothing wrong."""
    _, record = LABEL_KINDS["pose"].encode(label, labels or {}, table)
    assert list(LABEL_KINDS["pose"].check(record, {}, table, tuple(table["size"]))) == []
    return [(item["bbox"], item["area"], item["box_from"]) for item in record]


def test_a_person_without_an_instance_has_the_box_of_its_joints_widened_and_cut_to_the_picture():
    """By an eighth of its longer side, by two pixels at least; never empty, also where one joint alone is seen."""
    inside = person((20, 10), (36, 20), (28, 12))
    assert extent(inside) == [([18.0, 8.0, 20.0, 14.0], 280.0, "joints")]
    assert extent(person((10, 12), (42, 20), (28, 14))) == [([6.0, 8.0, 40.0, 16.0], 640.0, "joints")]
    by_a_quarter = extent(
        person((10, 12), (42, 20), (28, 14)), table=PEOPLE | {"widened": 0.25}
    )  # as another run has it
    assert by_a_quarter == [([2.0, 4.0, 48.0, 24.0], 1152.0, "joints")]
    assert extent(person((1, 1), (57, 39), (9, 9))) == [([0.0, 0.0, 60.0, 40.0], 2400.0, "joints")]
    assert extent(person((60, 40), (0, 0), (0, 0), visibility=(1, 0, 0))) == [([58.0, 38.0, 2.0, 2.0], 4.0, "joints")]
    assert extent(person((70, -3), (0, 0), (0, 0), visibility=(2, 0, 0)))[0][1] > 0  # a joint outside the picture
    assert extent(person((1, 1), (2, 2), (3, 3), visibility=(0, 0, 0))) == []  # nothing tells where it is
    _, (item,) = LABEL_KINDS["pose"].encode(inside, {}, PEOPLE)
    for changes in ({"bbox": [18.0, 8.0, 20.0, 14.002]}, {"area": 0}, {"box_from": "instance", "area": 0}):
        assert len(list(LABEL_KINDS["pose"].check([item | changes], {}, PEOPLE, (40, 60)))) == 1, changes


def test_a_person_has_the_box_and_area_of_the_instance_that_most_of_its_joints_lie_on():
    def figures(*boxes, names=("cone", "person"), kinds=None, scores=None):
        masks = np.zeros((len(boxes), 40, 60), bool)
        for mask, (top, left, bottom, right) in zip(masks, boxes):
            mask[top:bottom, left:right] = True
        kinds = np.array(kinds or [1] * len(boxes))
        return {"instance": Instances(masks, kinds, np.array(scores or [0.9] * len(boxes)), names)}

    one = person((20.5, 10.5), (36.5, 20.5), (28.5, 12.5))
    from_joints, whole = extent(one), (2, 18, 30, 40)  # with its head
    found = [([18.0, 2.0, 22.0, 28.0], 616, "instance")]
    assert extent(one, figures(whole)) == found == extent(one, figures((2, 30, 30, 40), whole))  # all joints, not some
    assert extent(one, figures((2, 18, 30, 30), whole)) == found == extent(one, figures(whole, (2, 18, 30, 30)))
    assert extent(one, figures(whole, names=("cone", "woman"))) == found
    assert extent(one, figures((25, 0, 40, 60))) == from_joints  # none of the joints
    assert extent(one, figures((2, 30, 30, 40))) == from_joints  # a third of them
    half = extent(person((20.5, 10.5), (36.5, 20.5), (0, 0), visibility=(2, 1, 0)), figures((2, 18, 30, 30)))
    assert half == [([18.0, 2.0, 12.0, 28.0], 336, "instance")]
    assert extent(one, figures(whole, kinds=[0])) == from_joints  # a cone
    assert extent(one, figures(whole, scores=[0.3])) == from_joints  # too unsure to be shown
    assert extent(one, figures(whole, scores=[0.4])) == found
    two = Keypoints(*(np.concatenate([part, part]) for part in (one.points, one.visibility, one.scores)), one.joints)
    assert [kind for *_, kind in extent(two, figures(whole))] == ["instance", "joints"]  # no mask is taken twice
    assert [kind for *_, kind in extent(two, figures(whole, (0, 0, 40, 60)))] == ["instance", "instance"]


def test_files_count_joints_from_the_middle_of_the_first_pixel_as_coco_does():
    """The middle of pixel (10, 20) is written as 10, 20."""
    label = person((10.5, 20.5), (0.25, 511.123), (1 / 3, 99.9))
    _, record = encoded("pose", label)
    assert record[0]["keypoints"][:2] == [10, 20]
    table = {"joints": label.joints, "limbs": label.limbs}
    decoded = LABEL_KINDS["pose"].decode({}, record, table)
    assert np.abs(decoded.points - label.points).max() < 4e-5 and pose_labels.people(record, table, None)[0][:2] == [
        10.5,
        20.5,
    ]
    between = [{"keypoints": [10.28, 20.12, 2], "num_keypoints": 1}, {"keypoints": [1, 1, 0], "num_keypoints": 0}]
    assert pose_labels.people(between, table, None) == [
        [10.8, 20.6, 2.0]
    ]  # to a tenth, and whom no joint shows left out
    written = LABEL_KINDS["pose"].table(SimpleNamespace(joints=("head",), limbs=()), 64, ())
    assert written["origin"] == "middle of the first pixel"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_keypoints": 2}, "joints, the ledger says 2"),
        ({"keypoint_scores": [1.0, 1.0]}, "person 0 has joints that are no joints"),
        ({"keypoint_scores": [1.0, 1.0, 1.0, 1.0]}, "person 0 has joints that are no joints"),
        ({"score": 1.01}, "person 0 has joints that are no joints"),
        ({"score": -0.01}, "person 0 has joints that are no joints"),
        ({"bbox": [0.0, 0.0, 5.5, 5.5014]}, None),  # what rounding three digits may do
        ({"bbox": [0.0, 0.0, 5.5, 5.502]}, "the ledger says [0.0, 0.0, 5.5, 5.502]"),
        ({"bbox": [0.0, 0.0, 5.5, 5.498]}, "the ledger says [0.0, 0.0, 5.5, 5.498]"),
        ({"area": 30.2678}, None),
        ({"area": 30.2682}, "and 30.2682 pixels"),
        ({"area": 30.2318}, "and 30.2318 pixels"),
    ],
)
def test_a_record_of_a_person_is_held_to_its_joints(changes, said):
    _, (item,) = encoded("pose", person((1.5, 1.5), (3.5, 2.5), (2.5, 3.5)))
    wrong = found_wrong("pose", {}, [item | changes], 16)
    assert len(wrong) == bool(said) and all(said in line for line in wrong)


# ---- distances of labels, which verify judges


def test_instances_differ_by_the_scores_that_their_masks_do_not_share():
    distance = LABEL_KINDS["instance"].distance
    sure, doubtful = [1.0], [0.25]
    whole, half = instances((0, 0, 4, 4), scores=sure), instances((0, 0, 2, 4), scores=sure)
    assert distance(whole, whole) == 0 and distance(half, whole) == 0.5 and distance(instances(), instances()) == 0
    assert distance(instances(), whole) == distance(whole, instances()) == 1
    assert distance(instances((0, 0, 4, 4), classes=[1], scores=sure), whole) == 1
    first, second = (0, 0, 2, 4), (2, 0, 4, 4)
    assert distance(instances(second, first), instances(first, second)) == 0  # two of one class may change places
    assert distance(instances(first, first), instances(first, second)) == 0.5  # each has one partner
    assert distance(instances(first, second), instances(first, first)) == 0.5
    beside = instances((0, 0, 4, 4), first, scores=sure + doubtful)
    assert distance(beside, whole) == distance(whole, beside) == pytest.approx(0.25 / 2.25)  # a doubtful one more
    assert distance(instances(first, scores=doubtful), instances()) == 0.25
    assert distance(instances(first, scores=doubtful), instances(first, scores=sure)) == pytest.approx(0.75 / 1.25)


@pytest.mark.parametrize(("count", "is_left_alone"), [(256, False), (257, True)])
def test_outlines_follow_colours_between_as_many_numbers_as_8_bits_hold(count, is_left_alone):
    numbers = (np.arange(17 * 17, dtype=np.int32) % count).reshape(17, 17)
    label = SemanticMap(numbers, np.ones((17, 17), np.float32), ("none",))
    followed = LABEL_KINDS["open-vocabulary"].follow_colours(label, np.zeros((17, 17, 3), np.uint8))
    assert (followed is label) == is_left_alone


def test_maps_overlap_the_truth_where_that_is_known():
    truth, found = (
        SemanticMap(np.uint8([row]), np.ones((1, 4), np.float32), ("wall", "ball"))
        for row in ([0, 1, 1, 255], [0, 1, 0, 1])
    )
    assert LABEL_KINDS["semantic"].overlap(found, truth) == 0.5  # 1 of 2 pixels of either class


def test_instances_overlap_the_truth_by_the_best_of_their_class():
    overlap, whole = LABEL_KINDS["instance"].overlap, instances((0, 0, 4, 4))
    assert overlap(instances((0, 0, 1, 4), (0, 0, 2, 4)), whole) == 0.5 and overlap(instances(), whole) == 0
    assert overlap(whole, instances()) == 1, "nothing is missed"
    assert overlap(instances((0, 0, 4, 4), classes=[1]), whole) == 0


@pytest.mark.parametrize(("left", "count"), [(1, 0), (2, 1)])  # pixels of 16 outside of what is drawn anew
def test_an_instance_that_was_not_found_again_stays_where_a_tenth_of_it_is_left(left, count):
    region, merge = np.ones((4, 4), bool), LABEL_KINDS["instance"].merge
    region[0, :left] = False
    assert merge(instances((0, 0, 4, 4)), instances(), region).masks.sum((1, 2)).tolist() == [left] * count
    assert merge(instances((0, 0, 4, 4)), instances((0, 0, 4, 3)), region).masks.sum((1, 2)).tolist() == [12]
    assert merge(instances((0, 0, 1, 4)), instances(), region).masks.sum((1, 2)).tolist() == [left]  # of 4 pixels


def test_of_several_instances_the_one_that_was_found_again_takes_the_new_score():
    region, left, right = np.zeros((4, 4), bool), (0, 0, 4, 2), (0, 2, 4, 4)
    region[:, 2:] = True
    old, new = instances(left, right, scores=[0.5, 0.6]), instances(right, scores=[0.9])
    merged = LABEL_KINDS["instance"].merge(old, new, region)
    assert (merged.masks == old.masks).all() and merged.scores.tolist() == pytest.approx([0.5, 0.9])
    grown = LABEL_KINDS["instance"].merge(old, new, np.ones((4, 4), bool))
    assert grown.masks.sum((1, 2)).tolist() == [8] and grown.scores.tolist() == pytest.approx([0.9])
    half = LABEL_KINDS["instance"].merge(instances((0, 0, 4, 4)), instances((0, 0, 4, 4), scores=[0.9]), region)
    assert half.masks.sum() == 16 and half.scores.tolist() == [0.5]  # of as many pixels on both sides the old one's


@pytest.mark.parametrize(("left", "pixels"), [(1, [4]), (0, [])])  # half of its 8 pixels, a third of 12
def test_an_instance_of_which_half_lies_in_what_is_drawn_anew_is_added(left, pixels):
    region = np.zeros((4, 4), bool)
    region[:, 2:] = True
    merged = LABEL_KINDS["instance"].merge(instances(), instances((0, left, 4, 3)), region)
    assert merged.masks.sum((1, 2)).tolist() == pixels


@pytest.mark.parametrize(
    ("rows", "visibility", "left"),
    [(5, (2, 1, 0), [[2, 0, 0]]), (8, (2, 1, 0), [[2, 1, 0]]), (1, (2, 1, 0), []), (5, (2, 2, 2), [])],
)
def test_a_person_that_half_of_its_joints_lay_into_a_region_is_added(rows, visibility, left):
    found, region = person((2, 2), (2, 6), (9, 9), visibility=visibility), np.zeros((16, 16), bool)
    region[:rows] = True
    nobody = Keypoints(found.points[:0], found.visibility[:0], found.scores[:0], found.joints, found.limbs)
    assert LABEL_KINDS["pose"].merge(nobody, found, region).visibility.tolist() == left


@pytest.mark.parametrize(("height", "score"), [(8, 0.25), (9, 0.75)])  # of its box, of 4 x 4 before
def test_a_person_goes_on_where_half_of_both_boxes_is_common(height, score):
    old, new = (person((0, 0), (4, high), (4, 0), score=sure) for high, sure in ((4, 0.25), (height, 0.75)))
    merged = LABEL_KINDS["pose"].merge(old, new, np.ones((16, 16), bool))
    assert merged.scores.tolist() == [score] and (merged.points == new.points).all()


def test_a_joint_outside_of_what_was_drawn_anew_stays_where_it_was():
    old, new = person((2, 8), (2, 2), (8, 12)), person((2, 4), (3, 2), (8, 12), visibility=(2, 1, 2))
    region = np.zeros((16, 16), bool)
    region[:6] = True
    merged = LABEL_KINDS["pose"].merge(old, new, region)
    assert merged.points[0, :, :2].tolist() == [[2, 8], [3, 2], [8, 12]] and merged.visibility.tolist() == [[2, 1, 2]]


def test_a_map_is_cut_to_what_another_label_shows_and_is_outside_as_sure_as_that():
    stored, mask = LABEL_KINDS["semantic"], semantic([[0, 1], [1, 0]], 0.75)
    inside, sure = stored.mask_of(mask, "ball")
    assert inside.tolist() == [[False, True], [True, False]] and (sure == 0.75).all()
    for names, outside in (("background", "cup"), 0), (("cup", "background"), 1), (("cup", "hat"), 255):
        label = SemanticMap(np.uint8([[0, 0], [1, 1]]), np.full((2, 2), 0.5, np.float32), names)
        cut = stored.within(label, inside, sure)
        assert cut.labels.tolist() == [[outside, 0], [1, outside]] and cut.labels.dtype == np.uint8
        assert cut.confidence.tolist() == [[0.75, 0.5], [0.5, 0.75]]


def test_instances_are_cut_to_what_another_label_shows_and_those_without_a_pixel_left_go():
    stored = LABEL_KINDS["instance"]
    shown = instances((0, 0, 2, 4), (0, 0, 4, 1), (3, 3, 4, 4), classes=[0, 0, 1], scores=[0.4, 0.39, 0.9])
    inside, sure = stored.mask_of(shown, "ball")
    assert (inside == shown.masks[0]).all() and (sure == 1).all()  # the second is too unsure to be shown
    cut = stored.within(instances((1, 1, 4, 2), (2, 0, 4, 4), scores=[0.5, 0.75]), inside, sure)
    assert np.argwhere(cut.masks).tolist() == [[0, 1, 1]] and cut.scores.tolist() == [0.5]
    assert not stored.mask_of(instances((0, 0, 2, 4), classes=[1]), "ball")[0].any()


def test_a_joint_lies_in_the_pixel_that_its_place_is_within_and_points_alone_do_not_overlap():
    region = np.zeros((4, 8), bool)
    region[2, 3] = True
    places = np.array([[3.6, 2.6], [3.0, 2.0], [4.0, 2.5], [2.9, 2.5]])  # x, then y
    assert pose_labels._inside(places, np.array([2, 1, 2, 2]), region).tolist() == [True, True, False, False]
    assert not pose_labels._inside(places, np.zeros(4), region).any()
    region[:] = False
    region[3, 7] = region[0, 0] = True  # what lies beyond the edge is of the pixel at it
    assert pose_labels._inside(np.array([[8.0, 4.0], [-0.2, -3.0]]), np.ones(2), region).all()
    corner, point, square = np.array([2.0, 3.0]), np.zeros(2), np.array([2.0, 2.0])
    assert pose_labels._box_iou((corner, point), (corner, point)) == 0.0
    assert pose_labels._box_iou((corner, square), (corner + 1, square)) == 1 / 7  # 1 of 4 + 4 - 1


def test_a_person_without_a_joint_has_an_empty_box_and_joints_of_another_form_are_named():
    label = person((1, 2), (3, 4), (5, 6))
    nobody = person((0, 0), (0, 0), (0, 0), visibility=(0, 0, 0))
    assert [side.tolist() for side in pose_labels._box(nobody.points[0], np.zeros(3, bool))] == [[0, 0], [0, 0]]
    _, (item,) = encoded("pose", label)
    for change in (
        {"keypoints": [1, 2, 3, *item["keypoints"][3:]]},
        {"keypoint_scores": [0.25] * 2},
        {"score": 1.5},
    ):
        assert "person 0 has joints that are no joints" in found_wrong("pose", {}, [item | change], 16)


def test_a_picture_for_a_page_is_a_png_whatever_its_mode():
    for mode in ("P", "RGB", "L"):
        drawn = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert(mode)
        read = Image.open(io.BytesIO(label_files.picture_bytes(drawn)))
        assert read.format == "PNG" and read.mode == mode and (np.array(read) == np.array(drawn)).all()


def test_palettes_of_another_name_are_refused():
    with pytest.raises(ValueError, match="palette is 'rainbow'"):
        check_palette({"palette": "rainbow"})


def test_values_of_different_shapes_are_stacked_as_a_list():
    same, other = torch.zeros(2), torch.zeros(3)
    assert label_files.stack([same, same]).shape == (2, 2)
    assert [each.shape[0] for each in label_files.stack([same, other])] == [2, 3]


# median and 99th percentile that `verify` lets pass: fp32, fp32 on its own, halves, halves on their own
LIMITS = {
    "semantic": ((1e-4, 1e-3), (1e-3, 1e-2), (5e-3, 2e-2), (2e-2, 0.1)),  # share of pixels
    "instance": ((1e-3, 1e-2), (1e-2, 1e-1), (2e-2, 0.1), (5e-2, 0.4)),  # share of the scores
    "depth": ((1e-4, 4e-4), (1e-3, 1e-2), (5e-3, 2e-2), (2e-2, 0.1)),  # relative error
    "pose": ((1e-2, 1e-1), (5e-2, 0.5), (0.5, 2.0), (1.0, 8.0)),  # pixels
}


@pytest.mark.parametrize("task", LIMITS)
def test_verify_is_not_loosened_unnoticed(task):
    gates = LABEL_KINDS[task].gates
    assert (gates.exact, gates.free_exact, gates.rounded, gates.free_rounded) == LIMITS[task]


def test_a_lost_instance_fails_verify_where_it_was_sure():
    gates = LABEL_KINDS["instance"].gates
    whole, nothing = instances((0, 0, 4, 4), scores=[0.9]), instances()
    lost = LABEL_KINDS["instance"].distance(nothing, whole)
    assert all(lost > limit for pair in (gates.free_rounded, gates.rounded, gates.free_exact) for limit in pair)


def test_where_things_lie_in_a_picture_in_shares_of_its_sides():
    (number, name), *_ = LABEL_KINDS["instance"].names(TABLES["instance"]).items()
    record = [{"category_id": number, "score": 0.75, "area": 6, "bbox": [2, 1, 4, 2]}]
    (thing,) = LABEL_KINDS["instance"].things(record, TABLES["instance"], (8, 16))
    assert thing == (name, 0.75, 6 / 128, 4 / 16, 2 / 8)


def test_the_bounds_of_a_mask():
    mask = np.zeros((6, 8), bool)
    mask[2:5, 3:7] = True
    assert pictures.bounds(mask) == (3, 2, 7, 5) and pictures.bounds(mask & False) == (0, 0, 0, 0)


def test_people_differ_by_the_mean_distance_of_their_joints():
    distance = LABEL_KINDS["pose"].distance
    here, there = person((1, 1), (2, 2), (3, 3)), person((1, 1), (2, 2), (6, 7))
    nobody = Keypoints(here.points[:0], here.visibility[:0], here.scores[:0], here.joints, here.limbs)
    assert distance(here, here) == 0 and distance(there, here) == distance(here, there) == pytest.approx(5 / 3)
    assert distance(nobody, here) == distance(here, nobody) == float("inf") and distance(nobody, nobody) == 0


@pytest.mark.parametrize(
    ("farthest", "unit", "steps"),
    [(10, "millimetre", 1000), (65.535, "millimetre", 1000), (65.536, "1/256 metre", 256), (80, "1/256 metre", 256),
     (255.99, "1/256 metre", 256), (256, "centimetre", 100), (655.35, "centimetre", 100), (1e6, "metre", 1)],
)  # fmt: skip
def test_a_depth_map_has_the_finest_unit_in_which_its_farthest_depth_fits(farthest, unit, steps):
    """run.json, the file itself and the card name it."""
    stored = LABEL_KINDS["depth"]
    metres = np.linspace(1, min(farthest, 65535), 64, dtype=np.float32).reshape(8, 8)
    files, record = stored.encode(DepthMap(metres, farthest), {}, {"unit": unit})
    picture = Image.open(io.BytesIO(files["depth"]))
    assert picture.text == {"depth unit": unit} and record["max"] == pytest.approx(
        min(farthest, 65535), abs=0.6 / steps
    )
    table = stored.table(SimpleNamespace(max_depth=farthest), 8, ())
    assert table == {"max_depth": farthest, "unit": unit}
    pixels = {"depth": np.array(picture)}
    assert np.abs(stored.decode(pixels, record, table).metres - metres).max() <= 0.5001 / steps
    assert list(stored.check(record, pixels, table, (8, 8))) == []
    assert f"divided by {steps:g}" in "\n".join(stored.section(table, {}))


def test_a_depth_map_of_an_unknown_unit_is_refused_and_one_without_has_millimetres():
    stored, pixels = LABEL_KINDS["depth"], {"depth": np.full((2, 2), 1500, np.uint16)}
    assert stored.decode(pixels, {}, {"max_depth": 80.0}).metres[0, 0] == 1.5
    with pytest.raises(Refused, match="labels.depth.unit is 'furlong'"):
        stored.decode(pixels, {}, {"max_depth": 80.0, "unit": "furlong"})


def test_maps_differ_by_the_share_of_pixels_and_depths_by_their_relative_error():
    labels = np.zeros((4, 4))
    labels[0, 0] = 1
    assert LABEL_KINDS["semantic"].distance(semantic(labels), semantic(np.zeros((4, 4)))) == 1 / 16
    near, far = (DepthMap(np.full((4, 4), metres, np.float32), 4.0) for metres in (2, 1))
    assert LABEL_KINDS["depth"].distance(near, far) == 1 and LABEL_KINDS["depth"].distance(far, near) == 0.5


def test_the_most_alike_of_several_instances_are_pairs_and_what_hardly_overlaps_is_another():
    whole, half = (0, 0, 4, 4), (0, 0, 2, 4)
    one, two = instances(whole, scores=[1.0]), instances(half, whole, scores=[1.0, 1.0])
    assert LABEL_KINDS["instance"].distance(one, two) == pytest.approx(1 / 3)
    everywhere = np.ones((4, 4), bool)
    for left, number in ((1, 0), (0, 7)):  # an IoU of 4 / 16, and of 8 / 16
        old = replace(instances((0, 0, 4, 2), scores=[0.5]), ids=np.array([7]))
        merged = LABEL_KINDS["instance"].merge(old, instances((0, left, 4, 4), scores=[0.9]), everywhere)
        assert merged.ids.tolist() == [number] and merged.scores.tolist() == pytest.approx([0.9])
        assert merged.masks.sum((1, 2)).tolist() == [4 * (4 - left)]
    again = LABEL_KINDS["instance"].merge(two, two, everywhere)
    assert (again.masks == two.masks).all() and again.scores.tolist() == [1, 1]


def test_instances_are_of_the_words_of_a_run_where_their_decoder_knows_no_class():
    for is_open, names in ((True, ["cup", "mug"]), (False, ["ball"])):
        config = SimpleNamespace(is_open=is_open, classes=("ball",))
        assert LABEL_KINDS["instance"].table(config, 8, ("cup", "mug")) == {"classes": names, "size": [8, 8]}
    item = {"category_id": 2, "score": 0.5, "segmentation": {"size": [4, 4], "counts": [0, 16]}}
    table = {"classes": ["ball", "cone"], "size": [4, 4], "numbers": [5, 2]}
    assert LABEL_KINDS["instance"].decode({}, [item], table).class_ids.tolist() == [1]
    assert LABEL_KINDS["instance"].words([item], table, 1) == ["cone"]


def test_pictures_show_what_is_sure_and_known():
    image = np.zeros((4, 4, 3), np.uint8)
    drawn = LABEL_KINDS["instance"].picture(instances((0, 0, 4, 2), (0, 2, 4, 4), scores=[0.4, 0.39]), image)
    assert np.array(drawn).any(2).tolist() == [[True, True, False, False]] * 4
    depth = LABEL_KINDS["depth"].picture(DepthMap(np.float32([[0, 100, 150, 200]]), 200.0), image)
    assert np.array(depth).tolist() == [[255, 0, 128, 255]]  # what is not known as the farthest
    assert depth.getpalette()[:3] == [0xFC, 0xFD, 0xBF] and depth.getpalette()[-3:] == [0, 0, 4]
    picture = pictures.depth_picture(np.ones((64, 512), np.uint16))
    assert picture.size == (256, 32)
    assert picture.getpalette()[3 * 51 : 3 * 52] == [252, 159, 112]  # 1.6 of 8 steps: 0.4 fec287 + 0.6 fb8761
    many = SemanticMap(np.int32([[299]]), np.ones((1, 1), np.float32), ("none",))
    assert np.array(LABEL_KINDS["open-vocabulary"].picture(many, image)).tolist() == [[list(colour(299))]]


def test_boxes_of_persons_are_held_to_the_sides_of_oblong_pictures():
    def wrong(bbox, area):
        _, (item,) = encoded("pose", person((1, 1), (2, 2), (3, 3)))
        item |= {"bbox": bbox, "area": area, "box_from": "instance"}
        return list(LABEL_KINDS["pose"].check([item], {}, PEOPLE, (40, 60)))  # 60 pixels wide

    assert wrong([50, 0, 10, 40], 400) == [] and wrong([0, 30, 1, 10], 1) == []
    for bbox, area in (
        ([0, 31, 1, 10], 5),
        ([51, 0, 10, 10], 5),
        ([-1, 0, 2, 2], 2),
        ([0, 0, 2, 2], 5),
        ([0, 0, 2, 2], 0),
    ):
        assert wrong(bbox, area) == [f"person 0 cannot fill {area} pixels in {bbox}"]


def test_ids_of_instances_and_files_of_labels_are_read_as_they_were_written():
    things = Instances(
        np.ones((2, 4, 4), bool), np.array([1, 0]), np.float32([0.5, 0.25]), ("ball", "cone"), np.array([7, 3])
    )
    _, record = encoded("instance", things)
    assert LABEL_KINDS["instance"].decode({}, record, TABLES["instance"]).ids.tolist() == [7, 3]
    assert LABEL_KINDS["instance"].decode({}, [], TABLES["instance"]).ids is None
    sample = Sample(Request(3, "a", 0), np.zeros((4, 4, 3), np.uint8), {"semantic": semantic(np.eye(4))})
    files, records = label_files.encode(sample, "jpg", TABLES, "part/")
    paths = {role: path for role, (path, _) in files.items()}
    assert paths == {
        "image": "part/images/00000003.jpg",
        "semantic": "part/semantic/00000003.png",
        "confidence": "part/confidence/00000003.png",
    }
    pixels = {role: np.array(images.decode_image(content, path)) for role, (path, content) in files.items()}
    read = LABEL_KINDS["semantic"].decode(pixels, records["semantic"], TABLES["semantic"])
    assert (read.labels == np.eye(4)).all()


def test_the_card_tells_the_mean_agreement_of_maps_and_a_pose_has_the_class_of_persons():
    stored, table = LABEL_KINDS["attention"], LABEL_KINDS["attention"].table(None, 4, ("ball",))
    counts = Counter()
    for share in (0.5, 1.0):
        counts.update(stored.count({"pixels": {"0": 4}, "agreement": {"semantic": share}}))
    assert [*stored.words({"pixels": {"0": 3, "1": 1}, "agreement": {"semantic": 1.0}}, table, 2)] == ["background"]
    lines = list(stored.section(table, counts))
    assert lines[-1] == "On 75.0% of their certain pixels these maps agree with those of the semantic decoder.\n"
    assert "| 0 | background | 100.00% |" in lines and "| 1 | ball | 0.00% |" in lines
    numbered = number_classes({"pose": TABLES["pose"], "semantic": {"classes": ["background", "cup"]}})
    assert numbered["classes"] == ["background", "cup", "person"] and numbered["labels"]["pose"]["category"] == 2


def test_depths_of_earlier_versions_that_count_the_unknown_are_right_and_merged_ones_are_new_inside():
    stored, pixels = LABEL_KINDS["depth"], {"depth": np.uint16([[0, 1000], [2000, 3000]])}
    for least, mean, count in ((1.0, 2.0, 0), (0.0, 1.5, 0), (0.0, 2.0, 1)):
        record = {"min": least, "mean": mean, "max": 3.0}
        assert len(list(stored.check(record, pixels, TABLES["depth"], (2, 2)))) == count
    old, new = (DepthMap(np.full((1, 2), metres, np.float32), 4.0) for metres in (1, 2))
    assert stored.merge(old, new, np.array([[True, False]])).metres.tolist() == [[2, 1]]


def test_units_and_values_of_layers_are_those_of_their_table():
    stored = LABEL_KINDS["depth"]
    assert [stored.steps({"unit": unit}) for unit in ("millimetre", "1/256 metre", "metre")] == [1000, 256, 1]
    assert mean_score([]) is None and mean_certainty({"depth": {"min": 1}, "pose": [{"score": 0.5}]}) == 0.5
    assert mean_certainty({"depth": {"min": 1}}) is None
    shares = semantic_labels.shares({"pixels": {"0": 5, "2": 2, "255": 1}}, {"classes": ["background", *"ab"]}, None)
    assert shares == [0.625, 0.125, {2: 0.25}]


def test_palettes_go_on_beyond_the_classes_of_a_label():
    whole, official = class_tables.PALETTE, class_tables.official_palette("coco", ((1, "person"),))
    assert [tuple(whole[3 * k : 3 * k + 3]) for k in (0, 3)] == [*map(colour, (0, 3))]
    assert whole[-3:] == bytes((236, 236, 236)) and len(official) == 768
    assert tuple(official[3:6]) == class_tables.builtin_table("coco").colour("person")
    assert official[:3] == whole[:3] and official[6:765] == whole[6:765] and official[765:] == bytes(3)
    own = {"palette": "table", "classes": ["a"], "colours": [[255, 0, 255]]}
    check_palette(own)
    for wrong in (256, -1):
        with pytest.raises(ValueError, match="three numbers from 0 to 255"):
            check_palette(own | {"colours": [[wrong, 0, 0]]})


def test_outlines_of_thin_and_of_long_masks():
    (ring,) = pictures.borders(np.ones((1, 3), bool))
    assert sorted(ring.tolist()) == [[x, y] for x in range(4) for y in range(2)]
    assert pictures.outline(np.zeros((4, 4), bool)) == ""
    long = np.zeros((64, 1024), bool)
    long[8:40, 512:768] = True
    corner = np.array([[True, True], [True, False]])
    assert len(pictures.borders(corner)[0]) == 8 and pictures.outline(corner).count("M") == 1
    assert pictures.outline(np.ones((1, 1), bool)).startswith("M")
    assert pictures.outline(np.tri(130, dtype=bool)) == "M0.5 0l129.5 129.5-129.5 0.5z"  # a triangle
    numbers = [int(value) for value in re.findall(r"-?\d+", pictures.outline(long))]
    assert numbers[0] in range(508, 517) and numbers[1] in range(4, 13) and set(numbers) <= {*range(-800, 801, 2)}


def test_a_line_below_a_picture_is_whole_up_to_90_letters():
    for length, shown in ((90, "a" * 90), (91, "a" * 89 + "…")):
        told = pictures.preview([(np.zeros((4, 4, 3), np.uint8), "a" * length)])
        assert f"<figcaption>{shown}</figcaption>" in told and f'title="{"a" * length}"' in told
    told = pictures.preview([(np.zeros((4, 4, 3), np.uint8), '"><b>')], "<i>")
    assert not {"<b>", "<i>", '""'} & set(re.findall(r'<\w>|""', told)) and "&quot;&gt;&lt;b&gt;" in told


def test_of_two_persons_the_one_with_more_joints_on_an_instance_has_its_box():
    first, second = person((2, 2), (4, 4), (30, 30)), person((2, 3), (4, 5), (6, 6))
    people = Keypoints(
        *(np.concatenate(parts) for parts in zip(*((x.points, x.visibility, x.scores) for x in (first, second)))),
        first.joints,
    )
    masks = np.zeros((1, 40, 60), bool)
    masks[0, :10, :10] = True
    labels = {"instance": Instances(masks, np.array([0]), np.float32([0.9]), ("person",))}
    assert [kind for *_, kind in extent(people, labels)] == ["joints", "instance"]


def test_joints_as_tensors_are_those_of_the_file_before_they_are_written():
    kind, joints = LABEL_KINDS["pose"], ("head", "neck", "hand")
    points = np.arange(18, dtype=np.float32).reshape(2, 3, 3) / 20 + 1
    label = Keypoints(points, np.array([[2, 0, 1], [0, 0, 0]]), np.float32([0.75, 0.25]), joints)
    table = {"joints": list(joints), "limbs": [], "size": [40, 60], "widened": 0.125}
    read = kind.decode({}, kind.encode(label, {}, table)[1], table)
    of_file, before = kind.arrays(read, table), kind.arrays(label, table)
    np.testing.assert_allclose(before["keypoints"], of_file["keypoints"], atol=1e-5)
    np.testing.assert_array_equal(before["scores"], of_file["scores"])
    assert before["keypoints"].shape == (1, 3, 3) and not before["keypoints"][0, 1].any()


def test_labels_are_printed_with_their_sides_width_first_and_what_they_show():
    plane = np.zeros((4, 6), np.uint8)
    plane[1:3], plane[3] = 1, 255
    assert repr(SemanticMap(plane, plane / 255, ("wall", "ball", "cube"))) == "<SemanticMap 6 x 4: wall, ball>"
    things = Instances(np.ones((1, 4, 6), bool), np.array([1]), np.float32([0.456]), ("ball", "cube"))
    assert repr(things) == "<Instances 6 x 4: cube 0.46>"
    assert repr(Instances(things.masks[:0], things.class_ids[:0], things.scores[:0], ())) == "<Instances 6 x 4: none>"
    assert repr(DepthMap(np.float32([[0.5, 2.25]]), 4.0)) == "<DepthMap 2 x 1: 0.50 to 2.25 m>"
    joints, visibility = ("nose", "eye", "ear"), np.array([[2, 1, 0], [0, 0, 2]])
    people = Keypoints(np.zeros((2, 3, 3), np.float32), visibility, np.ones(2, np.float32), joints)
    one = replace(people, points=people.points[:1], visibility=people.visibility[:1], scores=people.scores[:1])
    assert repr(one) == "<Keypoints of 1 person: 2 of 3 joints>"
    assert repr(people) == "<Keypoints of 2 people: 2 of 3 joints, 1 of 3 joints>"  # hidden ones are known, too
    sample = Sample(Request(3, "a ball", 7), np.zeros((4, 6, 3), np.uint8), {"instance": things, "pose": people})
    assert repr(sample) == "<Sample 6 x 4: 'a ball', seed 7, labels instance, pose>"
