"""Exports opened by the libraries of those who train on them, each compared with the run they were made of.

`make consumers` runs it in an environment of its own, without this package; $EXPORTED is what prepare.py wrote.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(os.environ["EXPORTED"])
OUT = ROOT / "exports"
TOLD = json.loads((ROOT / "truth.json").read_text())
THINGS, CLASSES, PARTS = TOLD["things"], TOLD["classes"], TOLD["parts"]
TRUTH = np.load(ROOT / "truth.npz")
SPLITS = [(split, ids) for split, ids in PARTS.items()]


def iou(first, second):
    return (first & second).sum() / max((first | second).sum(), 1)


def boxes(masks):
    sides = [(np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))) for mask in masks]
    return np.array([[x[0], y[0], x[-1] + 1, y[-1] + 1] for x, y in sides]).reshape(-1, 4)


@pytest.mark.parametrize("split, ids", SPLITS)
def test_pycocotools_finds_coco_equal_to_itself(split, ids):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(OUT / f"coco/annotations/instances_{split}2017.json"))
    assert [image["file_name"].partition(".")[0] for image in truth.dataset["images"]] == ids
    found = truth.loadRes([{**item} for item in truth.dataset["annotations"]])
    for kind in ("bbox", "segm"):
        judge = COCOeval(truth, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert judge.stats[0] == 1.0
    for image in truth.dataset["images"]:
        masks = [truth.annToMask(item).astype(bool) for item in truth.loadAnns(truth.getAnnIds([image["id"]]))]
        assert (np.array(masks) == TRUTH[f"{image['id']:08d}/masks"]).all()


@pytest.mark.parametrize("split, ids", SPLITS)
def test_supervision_reads_coco_and_yolo(split, ids):
    import supervision

    read = supervision.DetectionDataset
    sets = [
        read.from_coco(
            str(OUT / f"coco/images/{split}2017"),
            str(OUT / f"coco/annotations/instances_{split}2017.json"),
            force_masks=True,
        ),
        *(
            read.from_yolo(
                str(OUT / f"{kind}/images/{split}"),
                str(OUT / f"{kind}/labels/{split}"),
                str(OUT / f"{kind}/data.yaml"),
                force_masks=kind == "yolo-seg",
            )
            for kind in ("yolo-seg", "yolo-detect")
        ),
    ]
    for kind, data in zip(("coco", "yolo-seg", "yolo-detect"), sets, strict=True):
        assert len(data) == len(ids)
        for path, image, found in data:
            id = Path(path).stem
            assert (image[..., ::-1] == TRUTH[f"{id}/image"]).all()
            assert [data.classes[k] for k in found.class_id] == THINGS[id]
            masks = TRUTH[f"{id}/masks"]
            if kind == "coco":
                assert not len(masks) or (found.mask == masks).all()
            elif kind == "yolo-seg" and len(masks):
                # it draws the outline itself as well, so that each mask grows by a pixel
                assert all(iou(a, b) > 0.8 and (b <= a).all() for a, b in zip(found.mask, masks, strict=True))
            assert np.allclose(found.xyxy, boxes(masks), atol=1.001 if kind == "yolo-seg" else 1e-3)


def test_supervision_reads_voc():
    import supervision

    root = OUT / "voc/VOCdevkit/VOC2012"
    data = supervision.DetectionDataset.from_pascal_voc(str(root / "JPEGImages"), str(root / "Annotations"))
    assert len(data) == sum(map(len, PARTS.values()))
    for path, _, found in data:
        id = Path(path).stem
        assert [data.classes[k] for k in found.class_id] == THINGS[id]
        assert np.allclose(found.xyxy, boxes(TRUTH[f"{id}/masks"]), atol=1.001)  # VOC counts from 1


@pytest.mark.parametrize(
    "kind, path",
    [("coco", "coco"), ("voc", "voc/VOCdevkit/VOC2012"), ("yolo", "yolo-detect"), ("cityscapes", "cityscapes")],
)
def test_datumaro_imports_and_validates(kind, path):
    from datumaro import AnnotationType, Dataset, Environment

    data = Dataset.import_from(str(OUT / path), kind)
    assert len(data) == sum(map(len, PARTS.values())) and len(data.subsets()) == len(PARTS)
    names = [category.name for category in data.categories()[AnnotationType.label]]
    if kind != "cityscapes":  # which it knows by its own table
        for item in data:
            boxes_of = [a for a in item.annotations if a.type in (AnnotationType.bbox, AnnotationType.mask)]
            found = sorted(names[a.label] for a in boxes_of if a.type == boxes_of[0].type and names[a.label])
            wanted = sorted(THINGS[item.id.rpartition("/")[2]])
            assert found == wanted or kind == "voc" and set(wanted) <= set(found)
    validator = Environment().validators["detection"](
        few_samples_thr=1,
        imbalance_ratio_thr=1000,
        far_from_mean_thr=1000.0,
        dominance_ratio_thr=1.0,
        topk_bins=1.0,
    )
    if kind in ("coco", "yolo"):  # an attribute such as our score is undefined in all of COCO
        reports = validator.validate(data)["validation_reports"]
        errors = [each for each in reports if each["severity"] == "error"]
        assert [each for each in errors if each["anomaly_type"] != "UndefinedAttribute"] == []


def test_cityscapes_scripts_find_the_labels_equal_to_themselves(tmp_path):
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as things
    import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as pixels

    truth = [str(path) for path in sorted((OUT / "cityscapes/gtFine").rglob("*_labelIds.png"))]
    assert len(truth) == sum(map(len, PARTS.values()))
    pixels.args.quiet, pixels.args.JSONOutput = True, False
    pixels.args.evalInstLevelScore = True
    found = pixels.evaluateImgLists(truth, truth, pixels.args)
    scores = [score for score in found["classScores"].values() if score == score]
    assert found["averageScoreClasses"] == 1.0 and len(scores) > 5
    instances = [path.replace("labelIds", "instanceIds") for path in truth]
    predictions = []
    for k, path in enumerate(instances):
        numbers = np.asarray(Image.open(path))
        lines = []
        for number in np.unique(numbers[numbers >= 1000]):
            Image.fromarray((numbers == number).astype(np.uint8) * 255).save(tmp_path / f"{k}_{number}.png")
            lines.append(f"{k}_{number}.png {number // 1000} 1.0")
        (tmp_path / f"{k}.txt").write_text("\n".join(lines))
        predictions.append(str(tmp_path / f"{k}.txt"))
    things.args.quiet, things.args.JSONOutput = True, False
    things.args.gtInstancesFile, things.args.predictionPath = str(tmp_path / "instances.json"), str(tmp_path)
    things.writeDict2JSON = lambda *_: None  # a cache of theirs that fails over numpy's numbers
    scored = things.evaluateImgLists(predictions, instances, things.args)
    found = [each["ap"] for each in scored["averages"]["classes"].values() if each["ap"] == each["ap"]]
    assert found and min(found) == 1.0


def test_datasets_load_the_image_folder_and_parquet_offline():
    import datasets

    folder = datasets.load_dataset("imagefolder", data_dir=str(OUT / "hf"))
    parquet = datasets.load_dataset("parquet", data_dir=str(OUT / "hf-parquet"))
    names = json.loads((OUT / "hf" / "classes.json").read_text())["id2label"]
    for data in (folder, parquet):
        assert {split: len(rows) for split, rows in data.items()} == {
            {"val": "validation"}.get(split, split): len(ids) for split, ids in SPLITS
        }
        for rows in data.values():
            for row in rows:
                id = row["id"]
                assert (np.asarray(row["image"]) == TRUTH[f"{id}/image"]).all()
                shown = np.asarray(row["semantic"])
                assert [names[str(k)] for k in np.unique(shown)] == [
                    CLASSES[k] for k in np.unique(TRUTH[f"{id}/semantic"])
                ]
                assert np.abs(np.asarray(row["depth"]) / 1000 - TRUTH[f"{id}/depth"]).max() < 1e-3
                assert [names[str(k)] for k in row["objects"]["category"]] == THINGS[id]


def test_datasets_load_the_shards_of_wds_by_their_read_me():
    import datasets

    for data in (datasets.load_dataset(str(OUT / "wds"), streaming=streamed) for streamed in (False, True)):
        loaded = {split: list(rows) for split, rows in data.items()}
        for split, ids in SPLITS:
            rows = loaded[{"val": "validation"}.get(split, split)]
            assert [row["__key__"] for row in rows] == ids
            assert all((np.asarray(row["png"]) == TRUTH[f"{row['__key__']}/image"]).all() for row in rows)
            table = data["train"].features["json"]["objects"]["category"].feature
            named = [[table.int2str(k) for k in row["json"]["objects"]["category"]] for row in rows]
            assert named == [THINGS[id] for id in ids]


def test_webdataset_reads_every_sample():
    import webdataset

    def read_depth(data):
        return np.asarray(Image.open(io.BytesIO(data))) / 1000

    shards = sorted(map(str, (OUT / "wds").glob("*.tar")))
    decoders = webdataset.handle_extension("depth.png", read_depth), "pil"  # as docs/formats.md says
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode(*decoders))
    names = json.loads((OUT / "wds" / "classes.json").read_text())["id2label"]
    assert sorted(sample["__key__"] for sample in found) == sorted(THINGS)
    for sample in found:
        assert (np.asarray(sample["png"]) == TRUTH[f"{sample['__key__']}/image"]).all()
        shown, truth = np.asarray(sample["semantic.png"].convert("L")), TRUTH[f"{sample['__key__']}/semantic"]
        assert [names[str(k)] for k in np.unique(shown)] == [CLASSES[k] for k in np.unique(truth)]
        assert np.abs(sample["depth.png"] - TRUTH[f"{sample['__key__']}/depth"]).max() < 1e-3


def test_webdataset_and_datasets_read_a_run_in_shards_as_it_is():
    import datasets
    import webdataset

    shards = sorted(map(str, (OUT.parent / "shards" / "shards").glob("*.tar")))
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    streamed = list(datasets.load_dataset("webdataset", data_files={"train": shards}, streaming=True)["train"])
    assert [sample["__key__"] for sample in found] == [f"{k:08d}" for k in range(12)]
    for one, two in zip(found, streamed, strict=True):
        assert one["json"]["seed"] == two["json"]["seed"] == int(one["__key__"])
        assert (np.asarray(one["png"]) == np.asarray(two["png"].convert("RGB"))).all()
    index = datasets.load_dataset("parquet", data_files=[each.replace(".tar", ".parquet") for each in shards])["train"]
    assert list(index["id"]) == [sample["__key__"] for sample in found]


def test_voc_is_laid_out_as_torchvision_reads_it():
    """VOCSegmentation and VOCDetection: the files named by ImageSets of VOCdevkit/VOC2012."""
    root = OUT / "voc/VOCdevkit/VOC2012"
    for split, ids in SPLITS:
        for kind in ("Segmentation", "Main"):
            assert (root / "ImageSets" / kind / f"{split}.txt").read_text().split() == ids
        for id in ids:
            for place in (f"JPEGImages/{id}.jpg", f"SegmentationClass/{id}.png", f"Annotations/{id}.xml"):
                assert (root / place).exists()
            assert Image.open(root / f"SegmentationClass/{id}.png").mode == "P"
