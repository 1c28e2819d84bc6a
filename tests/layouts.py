"""Three demo scenes in the folder layout of every data set that has a reader."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet
from rendered import document, rendered

from datasetdm_fast.engine.decoders.config import COCO_JOINTS
from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.folder import RunFolder

SIDE = 96  # pixels before a layout cuts its own rectangle out
COUNT = 3


@cache
def views() -> list[world.View]:
    """Scenes with a person each."""
    found = (
        view
        for view in (world.view(seed, SIDE) for seed in range(200))
        if view.keypoints and len(np.unique(view.instance)) > 2
    )
    return [next(found) for _ in range(COUNT)]


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def things_of(view: world.View) -> list[tuple[int, int, np.ndarray]]:
    """Number, kind and mask of each thing in sight."""
    numbers = [int(k) for k in np.unique(view.instance) if k]
    return [(k, world.THINGS.index(view.scene.things[k - 1].kind), view.instance == k) for k in numbers]


def voc(root: Path, is_augmented: bool = False) -> None:
    for k, view in enumerate(views()):
        name = f"2007_{k:06d}"
        save(root / "JPEGImages" / f"{name}.jpg", view.image[:72], quality=95)
        labels = np.where(view.semantic >= 2, view.semantic - 1, 0).astype(np.uint8)[:72]
        labels[:2] = 255
        if is_augmented:
            save(root / "SegmentationClassAug" / f"{name}.png", labels)
        else:
            for folder, numbers in (
                ("SegmentationClass", labels),
                ("SegmentationObject", np.where(labels == 255, 255, view.instance[:72]).astype(np.uint8)),
            ):
                picture = Image.fromarray(numbers, "L").convert("P")
                picture.putdata(numbers.ravel().tolist())
                picture.putpalette([value for n in range(256) for value in (n, 255 - n, n // 2)])
                (root / folder).mkdir(parents=True, exist_ok=True)
                picture.save(root / folder / f"{name}.png")
            things = "".join(f"<object><name>{voc_name(kind)}</name></object>" for _, kind, _ in things_of(view))
            text(
                root / "Annotations" / f"{name}.xml",
                f"<annotation><size><width>{SIDE}</width><height>72</height></size>{things}</annotation>",
            )
    names = [f"2007_{k:06d}" for k in range(COUNT)]
    if is_augmented:
        text(
            root / "splits" / "train_aug.txt",
            "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in names),
        )
    else:
        for split in ("train", "val"):
            text(root / "ImageSets" / "Segmentation" / f"{split}.txt", "\n".join(names) + "\n")


def voc_name(kind: int) -> str:
    from datasetdm_fast.training.truth.selection import VOC_CLASSES

    return VOC_CLASSES[kind + 1]


def voc_augmented(root: Path) -> None:
    voc(root, is_augmented=True)


def coco(root: Path, split: str = "train2017") -> None:
    images, things, people = [], [], []
    for k, view in enumerate(views()):
        name = f"{k + 1:012d}.jpg"
        save(root / split / name, view.image[:, :80], quality=95)
        images.append(
            {
                "id": k + 1,
                "file_name": name,
                "width": 80,
                "height": SIDE,
                "coco_url": f"http://images.cocodataset.org/{split}/{name}",
            }
        )
        for number, kind, mask in things_of(view):
            mask = np.ascontiguousarray(mask[:, :80])
            encoded = mask_rle.encode(mask[None])
            box = encoded.boxes[0].tolist()
            row = {
                "id": len(things) + 1,
                "image_id": k + 1,
                "category_id": kind + 1,
                "area": float(mask.sum()),
                "bbox": box,
                "iscrowd": 0,
            }
            segmentation: object = encoded.rles[0]
            if number % 2:
                x, y, w, h = box
                segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            things.append(row | {"segmentation": segmentation})
            if number in view.keypoints and mask.any():
                joints = np.zeros((len(COCO_JOINTS), 3))
                joints[: len(world.JOINTS)] = view.keypoints[number]
                joints[joints[:, 2] == 0] = 0
                flat = [float(value) for value in np.round(joints, 2).ravel()]
                person = {"keypoints": flat, "num_keypoints": int((joints[:, 2] > 0).sum())}
                people.append(row | {"id": 1000 + len(people), "category_id": 1, "segmentation": segmentation} | person)
    crowd = {"size": [SIDE, 80], "counts": [SIDE * 70, SIDE * 10]}
    things.append(
        {
            "id": 900,
            "image_id": 1,
            "category_id": 1,
            "area": 960.0,
            "bbox": [70, 0, 10, SIDE],
            "iscrowd": 1,
            "segmentation": crowd,
        }
    )
    categories = [{"id": k + 1, "name": name, "supercategory": "é"} for k, name in enumerate(world.THINGS)]
    text(
        root / "annotations" / f"instances_{split}.json",
        json.dumps({"info": {}, "images": images, "annotations": things, "categories": categories}, ensure_ascii=False),
    )
    person = [{"id": 1, "name": "person", "keypoints": list(COCO_JOINTS), "skeleton": []}]
    text(
        root / "annotations" / f"person_keypoints_{split}.json",
        json.dumps({"images": images, "annotations": people, "categories": person}),
    )


def lvis(root: Path) -> None:
    coco(root)
    document = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    for image in document["images"]:
        del image["file_name"]
    document["annotations"] = [
        {k: v for k, v in row.items() if k != "iscrowd"} for row in document["annotations"] if not row["iscrowd"]
    ]
    text(root / "lvis_v1_train.json", json.dumps(document))


def cityscapes(root: Path) -> None:
    for k, view in enumerate(views()):
        stem = f"aachen_{k:06d}_000019"
        save(root / "leftImg8bit" / "train" / "aachen" / f"{stem}_leftImg8bit.png", view.image[24:72])
        labels = np.where(view.semantic < 2, view.semantic, view.semantic + 9).astype(np.uint8)[24:72]
        labels[-3:] = 255
        instances = np.where(view.instance > 0, 26000 + view.instance.astype(np.int32), 7).astype(np.uint16)[
            24:72
        ]  # every thing a car
        folder = root / "gtFine" / "train" / "aachen"
        save(folder / f"{stem}_gtFine_labelTrainIds.png", labels)
        save(folder / f"{stem}_gtFine_instanceIds.png", instances)


def nyu(root: Path) -> None:
    rows = []
    for k, view in enumerate(views()):
        save(root / "sync" / "living_room_0001b" / f"rgb_{k:05d}.jpg", view.image[:72])
        save(
            root / "sync" / "living_room_0001b" / f"sync_depth_{k:05d}.png",
            np.round(view.depth[:72] * 1000).astype(np.uint16),
        )
        rows.append(f"/living_room_0001b/rgb_{k:05d}.jpg /living_room_0001b/sync_depth_{k:05d}.png 518.8579\n")
    text(root / "train_list.txt", "".join(rows))
    text(root / "nyu_class_list.json", json.dumps(["kitchen", "living_room"]))


def kitti(root: Path) -> None:
    rows = ["2011_09_26/none.png None 721.5\n"]
    for k, view in enumerate(views()):
        save(root / "input" / "2011_09_26" / f"{k:010d}.png", view.image[48:80])
        depth = np.round(view.depth[48:80] * 256).astype(np.uint16)
        depth[::2] = 0  # a laser does not see every row
        save(root / "gt_depth" / "drive_0001" / f"{k:010d}.png", depth)
        rows.append(f"2011_09_26/{k:010d}.png drive_0001/{k:010d}.png 721.5377\n")
    text(root / "kitti_eigen_train.txt", "".join(rows))


def vkitti2(root: Path) -> None:
    for k, view in enumerate(views()):
        below = Path(f"Scene{k + 1:02d}") / "15-deg-left" / "frames"
        save(root / "Image" / below / "rgb" / "Camera_0" / "rgb_00000.jpg", view.image[:64])
        depth = np.round(view.depth[:64] * 100).astype(np.uint16)
        depth[0] = 65535  # the sky
        save(root / "Depth" / below / "depth" / "Camera_0" / "depth_00000.png", depth)


def deepfashion(root: Path) -> None:
    captions = {}
    for k, view in enumerate(views()):
        stem = f"MEN-Denim-id_{k:08d}-01_1_front"
        save(root / "images" / f"{stem}.jpg", view.image[:, :64])
        save(root / "segm" / f"{stem}_segm.png", view.semantic[:, :64])
        captions[f"{stem}.jpg"] = view.caption
    text(root / "captions.json", json.dumps(captions))


def yolo(root: Path) -> None:
    for k, view in enumerate(views()):
        save(root / "images" / "train" / f"{k:06d}.jpg", view.image[:80])
        rows = []
        for _, kind, mask in things_of(view):
            rows_there, columns_there = np.flatnonzero(mask[:80].any(1)), np.flatnonzero(mask[:80].any(0))
            left, right, top, bottom = (
                columns_there[0] / SIDE,
                (columns_there[-1] + 1) / SIDE,
                rows_there[0] / 80,
                (rows_there[-1] + 1) / 80,
            )
            rows.append(
                f"{kind} {left:.6f} {top:.6f} {right:.6f} {top:.6f} {right:.6f} {bottom:.6f} {left:.6f} {bottom:.6f}\n"
            )
        text(root / "labels" / "train" / f"{k:06d}.txt", "".join(rows))
    names = "".join(f"  {k}: {name}\n" for k, name in enumerate(world.THINGS))
    text(root / "data.yaml", f"path: .\ntrain: images/train\nnames:\n{names}")


def folder(root: Path) -> None:
    for k, view in enumerate(views()):
        save(root / "images" / f"scene {k}.png", view.image[:80])
        save(root / "masks" / f"scene {k}.png", view.semantic[:80])
        save(root / "depth" / f"scene {k}.png", np.round(view.depth[:80] * 1000).astype(np.uint16))
    text(root / "classes.txt", "\n".join(world.CLASSES) + "\n")
    text(root / "captions.json", json.dumps({f"scene {k}": view.caption for k, view in enumerate(views())}))


def hf_table() -> pa.Table:
    """Rows as Hugging Face stores them, with the bytes of pictures inside and what the columns are in the schema."""
    columns: dict[str, list] = {"image": [], "label": [], "depth": [], "text": []}
    for view in views():
        depth = np.round(view.depth[:80] * 1000).astype(np.uint16)
        for name, pixels, kind in (
            ("image", view.image[:80], "JPEG"),
            ("label", view.semantic[:80], "PNG"),
            ("depth", depth, "PNG"),
        ):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
            columns[name].append({"bytes": buffer.getvalue(), "path": f"{name}.{kind.lower()}"})
        columns["text"].append(view.caption)
    features: dict[str, dict] = {name: {"_type": "Image"} for name in ("image", "label", "depth")}
    features |= {"text": {"dtype": "string", "_type": "Value"}}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def id2label(root: Path) -> None:
    text(root / "id2label.json", json.dumps({str(k): name for k, name in enumerate(world.CLASSES)}))


def hf_parquet(root: Path) -> None:
    (root / "data").mkdir(parents=True)
    table = hf_table()
    for k, rows in enumerate((table.slice(0, 2), table.slice(2))):
        parquet.write_table(rows, root / "data" / f"train-{k:05d}-of-00002.parquet", row_group_size=1)
    id2label(root)


def hf_saved(root: Path) -> None:
    """As `DatasetDict.save_to_disk` writes it: streams of record batches, and a file that names them."""
    (root / "train").mkdir(parents=True)
    table, names = hf_table(), [f"data-{k:05d}-of-00002.arrow" for k in range(2)]
    for name, rows in zip(names, (table.slice(0, 2), table.slice(2)), strict=True):
        with pa.ipc.new_stream(root / "train" / name, table.schema) as file:
            file.write_table(rows, max_chunksize=1)
    (root / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (root / "dataset_dict.json").write_text('{"splits": ["train"]}')
    id2label(root)


def hf_imagefolder(root: Path) -> None:
    folder(root / "train")
    rows = [
        {
            "file_name": f"images/scene {k}.png",
            "mask_file_name": f"masks/scene {k}.png",
            "depth_file_name": f"depth/scene {k}.png",
            "text": view.caption,
        }
        for k, view in enumerate(views())
    ]
    text(root / "train" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    (root / "train" / "classes.txt").rename(root / "classes.txt")


def masks(root: Path) -> None:
    for k, view in enumerate(views()):
        name = f"{k}#Sports#{k}#Ball#0123"
        save(root / "DIS-TR" / "im" / f"{name}.jpg", view.image[:80], quality=95)
        soft = Image.fromarray(np.where(view.instance[:80] > 0, 255, 0).astype(np.uint8)).resize((SIDE, 80))
        save(root / "DIS-TR" / "gt" / f"{name}.png", np.asarray(soft))


def celebamask(root: Path) -> None:
    for k, view in enumerate(views()):
        number = k * 1000  # the third lies in the second folder
        save(root / "CelebA-HQ-img" / f"{number}.jpg", view.image.repeat(2, 0).repeat(2, 1), quality=95)
        for part, mask in (("skin", view.semantic > 0), ("l_eye", view.instance > 0), ("hair", view.semantic == 1)):
            pixels = np.where(mask, 255, 0).astype(np.uint8)
            path = root / "CelebAMask-HQ-mask-anno" / str(number // 2000) / f"{number:05d}_{part}.png"
            save(path, pixels if part == "skin" else pixels[..., None].repeat(3, 2))
    rows = "".join(f"{k * 1000} {162_769 - k} {162_770 - k}.jpg\n" for k in range(COUNT))
    text(root / "CelebA-HQ-to-CelebA-mapping.txt", f"idx orig_idx orig_file\n{rows}")


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def labelme(root: Path) -> None:
    for k, view in enumerate(views()):
        save(root / f"scene {k}.jpg", view.image[:80], quality=95)
        shapes: list[dict] = [{"label": "ball", "points": [[1, 1]], "shape_type": "point", "flags": {}}]
        for number, kind, mask in things_of(view):
            left, top, right, bottom = bounds(mask[:80])
            shape = {"label": world.THINGS[kind], "group_id": None if number % 2 else number, "shape_type": "mask"}
            if number % 3 == 1:
                corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
                shape |= {"shape_type": "polygon", "points": corners}
            elif number % 3 == 2:
                shape |= {"shape_type": "rectangle", "points": [[right, bottom], [left, top]]}
            else:
                buffer = io.BytesIO()
                Image.fromarray(np.where(mask[top:bottom, left:right], 255, 0).astype(np.uint8)).save(buffer, "PNG")
                inner = base64.b64encode(buffer.getvalue()).decode()
                shape |= {"points": [[left, top], [right - 1, bottom - 1]], "mask": inner}
            shapes.append(shape)
        document = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"scene {k}.jpg"}
        document |= {"imageData": None, "imageHeight": 80, "imageWidth": SIDE}
        text(root / f"scene {k}.json", json.dumps(document))


def cvat(root: Path) -> None:
    entries = []
    for k, view in enumerate(views()):
        save(root / "images" / "day" / f"{k}.png", view.image[:80])
        rows = ['<tag label="ball" source="manual"></tag>']
        for number, kind, mask in things_of(view):
            left, top, right, bottom = bounds(mask[:80])
            label = f'label="{world.THINGS[kind]}" occluded="0" z_order="{number}"'
            if number % 2:
                rows.append(f'<box {label} xtl="{left}" ytl="{top}" xbr="{right}" ybr="{bottom}"></box>')
            else:
                inner = mask[top:bottom, left:right].ravel()
                ends = np.flatnonzero(np.diff(np.concatenate([[False], inner])))
                runs = np.diff(np.concatenate([[0], ends, [inner.size]]))
                size = f'left="{left}" top="{top}" width="{right - left}" height="{bottom - top}"'
                rows.append(f'<mask {label} rle="{", ".join(map(str, runs))}" {size}></mask>')
        entries.append(f'<image id="{k}" name="day/{k}.png" width="{SIDE}" height="80">' + "".join(rows) + "</image>\n")
    labels = "".join(f"<label><name>{name}</name><color>#fa3253</color></label>" for name in world.THINGS)
    meta = f"<meta><task><name>scenes</name><labels>{labels}</labels></task></meta>"
    text(
        root / "annotations.xml",
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>{meta}\n'
        + "".join(entries)
        + "</annotations>\n",
    )


def run(root: Path) -> None:
    with RunFolder(root, document(COUNT, SIDE)) as opened:
        samples = [rendered(index, SIDE) for index in (0, 3, 4)]  # with a person each
        renamed = [replace(sample, request=replace(sample.request, index=k)) for k, sample in enumerate(samples)]
        opened.add(renamed, {"batch_size": COUNT})
        finish_run(opened)


# name -> (address before the colon, what writes it, the tasks it has truth for)
LAYOUTS: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "voc": ("voc", voc, ("semantic", "instance", "open-vocabulary")),
    "voc-augmented": ("voc", voc_augmented, ("semantic", "open-vocabulary")),
    "coco": ("coco", coco, ("semantic", "instance", "open-vocabulary", "pose")),
    "lvis": ("lvis", lvis, ("semantic", "instance", "open-vocabulary")),
    "cityscapes": ("cityscapes", cityscapes, ("semantic", "instance", "open-vocabulary")),
    "nyu": ("nyu", nyu, ("depth",)),
    "kitti": ("kitti", kitti, ("depth",)),
    "vkitti2": ("vkitti2", vkitti2, ("depth",)),
    "deepfashion-mm": ("deepfashion-mm", deepfashion, ("semantic", "open-vocabulary")),
    "yolo-seg": ("yolo-seg", yolo, ("semantic", "instance", "open-vocabulary")),
    "mask": ("mask", masks, ("semantic", "open-vocabulary")),
    "celebamask-hq": ("celebamask-hq", celebamask, ("semantic", "open-vocabulary")),
    "labelme": ("labelme", labelme, ("semantic", "instance", "open-vocabulary")),
    "cvat": ("cvat", cvat, ("semantic", "instance", "open-vocabulary")),
    "run": ("run", run, ("semantic", "instance", "open-vocabulary", "depth", "pose")),
    "folder": ("folder", folder, ("semantic", "open-vocabulary", "depth")),
    "hf-parquet": ("hf", hf_parquet, ("semantic", "open-vocabulary", "depth")),
    "hf-saved": ("hf", hf_saved, ("semantic", "open-vocabulary", "depth")),
    "hf-imagefolder": ("hf", hf_imagefolder, ("semantic", "open-vocabulary", "depth")),
}

# One of each way to store labels teaches a decoder in `make test`: maps, polygons, rows; the others in the long form.
TAUGHT = ("voc", "coco", "hf-parquet")
