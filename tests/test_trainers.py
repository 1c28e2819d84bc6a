"""Exports as transformers' trainers take them: what its processors of images hand a model is what the run holds, and
the loss of ten steps falls.

The files are read as the scripts of these trainers read them: with Pillow, pycocotools and the standard library.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rendered import write_run
from skips import long_test

from datasetdm_fast import convert, open_run

NUMBER, SIZE, STEPS = 6, 64, 10
# names that Cityscapes knows as well
NAMES = "wall=road,table=sidewalk,ball=car,cube=truck,cone=bus,ring=train,star=motorcycle,tree=bicycle"
FORMATS = "coco,voc,cityscapes,mmseg,hf,hf-parquet"
VOID = 255

pytestmark = long_test


@dataclass(frozen=True)
class Taught:
    """An image with a map [H, W]: of classes or, where `kinds` tells the class of each number, of segments; `void` is
    not taught.
    """

    image: np.ndarray
    map: np.ndarray
    names: dict[int, str]
    kinds: dict[int, int] | None = None
    void: int = VOID


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    write_run(path, NUMBER, SIZE)
    line = [str(path), "--to", FORMATS, "--classes", NAMES, "--quiet"]
    assert convert.main(line) == 0
    return path


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def rgb(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def maps_of_voc(root):
    root = root / "voc/VOCdevkit/VOC2012"
    lines = (root / "labelmap.txt").read_text().splitlines()[1:]
    names = {k: line.partition(":")[0] for k, line in enumerate(lines)}
    for id in (root / "ImageSets/Segmentation/train.txt").read_text().split():
        yield Taught(rgb(root / f"JPEGImages/{id}.jpg"), pixels(root / f"SegmentationClass/{id}.png"), names)


def maps_of_mmseg(root):
    told = {}
    exec((root / "mmseg/dataset.py").read_text(), told)
    part = told["datasets"]["train"]
    for path in sorted((root / "mmseg" / part["data_prefix"]["img_path"]).iterdir()):
        found = root / "mmseg" / part["data_prefix"]["seg_map_path"] / f"{path.stem}{part['seg_map_suffix']}"
        yield Taught(rgb(path), pixels(found), dict(enumerate(told["metainfo"]["classes"])))


TRAINED = "road sidewalk building wall fence pole light sign vegetation terrain sky person rider car truck bus train"


def maps_of_cityscapes(root):
    names = dict(enumerate([*TRAINED.split(), "motorcycle", "bicycle"]))
    for path in sorted((root / "cityscapes/leftImg8bit/train").rglob("*.png")):
        yield Taught(rgb(path), pixels(_fine(path, "labelTrainIds")), names)


def _fine(path: Path, kind: str) -> Path:
    return Path(str(path).replace("leftImg8bit/", "gtFine/").replace("leftImg8bit", f"gtFine_{kind}"))


def _names_of_hf(folder):
    return {int(k): name for k, name in json.loads((folder / "id2label.json").read_text()).items()}


def maps_of_hf(root):
    for line in (root / "hf/train/metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        image, labels = (root / "hf/train" / row[f"{name}_file_name"] for name in ("image", "semantic"))
        yield Taught(rgb(image), pixels(labels), _names_of_hf(root / "hf"))


def maps_of_parquet(root):
    import io

    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    for path in sorted((root / "hf-parquet/data").glob("train-*")):
        for row in parquet.read_table(path).to_pylist():
            image, labels = (io.BytesIO(row[name]["bytes"]) for name in ("image", "semantic"))
            yield Taught(rgb(image), pixels(labels), _names_of_hf(root / "hf-parquet"))


def things_of_coco(root):
    from pycocotools.coco import COCO

    told = COCO(str(root / "coco/annotations/instances_train2017.json"))
    names = {each["id"]: each["name"] for each in told.dataset["categories"]}
    for image in told.dataset["images"]:
        shown = rgb(root / "coco/images/train2017" / image["file_name"])
        items = told.loadAnns(told.getAnnIds([image["id"]]))
        yield _segments(shown, [(told.annToMask(item), item["category_id"]) for item in items], names)


def _segments(image, things, names):
    """Instances in a map, the first of them on top."""
    found, kinds = np.zeros(image.shape[:2], np.int64), {}
    for k, (mask, kind) in reversed(list(enumerate(things, 1))):
        found[mask.astype(bool)], kinds[k] = k, kind
    return Taught(image, found, names, kinds, void=0)


def panoptic_of_coco(root):
    folder = root / "coco/annotations"
    told = json.loads((folder / "panoptic_train2017.json").read_text())
    names = {each["id"]: each["name"] for each in told["categories"]}
    files = {each["id"]: each["file_name"] for each in told["images"]}
    for item in told["annotations"]:
        colours = rgb(folder / "panoptic_train2017" / item["file_name"]).astype(np.int64)
        kinds = {each["id"]: each["category_id"] for each in item["segments_info"]}
        image = rgb(root / "coco/images/train2017" / files[item["image_id"]])
        yield Taught(image, colours @ [1, 256, 65536], names, kinds, void=0)


def things_of_voc(root):
    for id, taught in zip(_ids_of_voc(root), maps_of_voc(root), strict=True):
        objects = pixels(root / f"voc/VOCdevkit/VOC2012/SegmentationObject/{id}.png")
        things = [(objects == k, int(taught.map[objects == k][0])) for k in np.unique(objects) if k not in (0, VOID)]
        yield _segments(taught.image, things, taught.names)


def _ids_of_voc(root):
    return (root / "voc/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").read_text().split()


def things_of_cityscapes(root):
    for path, taught in zip(
        sorted((root / "cityscapes/leftImg8bit/train").rglob("*.png")), maps_of_cityscapes(root), strict=True
    ):
        numbers = pixels(_fine(path, "instanceIds"))
        masks = [numbers == k for k in np.unique(numbers[numbers >= 1000])]
        yield _segments(taught.image, [(mask, int(taught.map[mask][0])) for mask in masks], taught.names)


def things_of_hf(root):
    from pycocotools import mask as run_lengths

    names = _names_of_hf(root / "hf")
    for line in (root / "hf/train/metadata.jsonl").read_text().splitlines():
        row, image = (found := json.loads(line)), rgb(root / "hf/train" / found["image_file_name"])
        told = zip(row["objects"]["rle"], row["objects"]["category"], strict=True)
        things = [(run_lengths.decode({"size": image.shape[:2], "counts": each}), kind) for each, kind in told]
        yield _segments(image, things, names)


def truth(run, task):
    """The classes that the labels of each sample show, by the names of the export."""
    new, found = dict(pair.split("=") for pair in NAMES.split(",")), []
    for sample in open_run(run):
        label = sample.label(task)
        numbers = label.class_ids if task == "instance" else np.unique(label.labels)
        words = [label.classes[k] for k in numbers]
        found.append([new.get(word, word) for word in words])
    return found


def falls(model, batch):
    """Whether ten steps on one batch make its loss smaller."""
    import torch

    taught = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(STEPS):
        taught.zero_grad()
        loss = model(**batch).loss.sum()
        loss.backward()
        taught.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < 0.95 * np.mean(losses[:2]), losses


@pytest.mark.parametrize("read", [maps_of_voc, maps_of_mmseg, maps_of_cityscapes, maps_of_hf, maps_of_parquet])
def test_segformer_learns_from_maps(run, read):
    import torch
    from transformers import SegformerConfig, SegformerForSemanticSegmentation
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    data = list(read(run / "exports"))
    processor = SegformerImageProcessorPil(size={"height": SIZE, "width": SIZE})
    batch = processor([each.image for each in data], [each.map for each in data], return_tensors="pt")
    known = set.union(*map(set, truth(run, "semantic"))) & set(data[0].names.values())
    for labels, words in zip(batch["labels"], truth(run, "semantic"), strict=True):
        shown = {data[0].names[int(k)] for k in labels.unique() if k != VOID}
        assert shown == set(words) & known and len(shown) > 1
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=max(data[0].names) + 1,
    )
    falls(SegformerForSemanticSegmentation(config), batch)


@pytest.mark.parametrize(
    "read",
    [things_of_coco, panoptic_of_coco, things_of_voc, things_of_cityscapes, things_of_hf],
)
def test_mask2former_learns_from_segments(run, read):
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    from bench.proof.students.networks.mask2former import STAGES, TINY, TINY_SWIN

    data = list(read(run / "exports"))
    processor = Mask2FormerImageProcessorPil(size={"height": SIZE, "width": SIZE}, ignore_index=0)
    batch = processor(
        [each.image for each in data],
        [each.map for each in data],
        instance_id_to_semantic_id=[each.kinds for each in data],
        return_tensors="pt",
    )
    is_panoptic = read.__name__.startswith("panoptic")
    things = set.union(*map(set, truth(run, "instance")))
    for taught, labels, masks, words, background in zip(
        data, batch["class_labels"], batch["mask_labels"], truth(run, "instance"), truth(run, "semantic"), strict=True
    ):
        shown = [taught.names[int(k)] for k in labels]
        assert sorted(word for word in shown if word in things) == sorted(words)
        assert {word for word in shown if word not in things} == (set(background) - things if is_panoptic else set())
        assert [int(mask.sum()) for mask in masks] == [int((taught.map == k).sum()) for k in np.unique(taught.map) if k]
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=TINY_SWIN | STAGES, num_labels=max(data[0].names) + 1, **TINY)
    falls(Mask2FormerForUniversalSegmentation(config), dict(batch))
