"""How true labels are: mIoU, COCO AP, AbsRel, PCK and OKS-AP, each fed image by image."""

from __future__ import annotations

import contextlib
import io

import numpy as np

from datasetdm_fast import mask_rle
from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap
from datasetdm_fast.readers import Labelled, Source


class Semantic:
    """Mean intersection over union from one confusion matrix over all pixels; 255 in the truth is left out."""

    def __init__(self, source: Source):
        self.classes, self.confusion = source.classes, np.zeros((len(source.classes),) * 2, np.int64)

    def add(self, truth: Labelled, found: SemanticMap) -> None:
        count, known = len(self.classes), truth.semantic != 255
        pairs = truth.semantic[known].astype(np.int64) * count + np.minimum(found.labels[known], count - 1)
        self.confusion += np.bincount(pairs, minlength=count * count).reshape(count, count)

    def result(self) -> dict:
        both = np.diag(self.confusion)
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        seen = self.confusion.sum(1) > 0
        iou = both / np.maximum(either, 1)
        return {"miou": float(iou[seen].mean()), "per_class": {name: float(value) for name, value, there in zip(self.classes, iou, seen) if there}}


class Depth:
    """Mean absolute relative error, root mean squared error in metres and the share within a factor 1.25."""

    def __init__(self, source: Source):
        self.rows: list[tuple[float, float, float]] = []

    def add(self, truth: Labelled, found: DepthMap) -> None:
        known = truth.depth > 0
        real, guess = truth.depth[known].astype(np.float64), found.metres[known].astype(np.float64)
        ratio = np.maximum(guess / real, real / np.maximum(guess, 1e-6))
        self.rows.append((float(np.mean(np.abs(guess - real) / real)), float(np.mean((guess - real) ** 2)), float(np.mean(ratio < 1.25))))

    def result(self) -> dict:
        absrel, squared, within = np.mean(self.rows, 0)
        return {"absrel": float(absrel), "rmse": float(np.sqrt(squared)), "delta_1.25": float(within)}


class Instance:
    """Mask AP by pycocotools over IoU 0.50:0.95, and at 0.50."""

    def __init__(self, source: Source):
        self.categories = [{"id": k + 1, "name": name} for k, name in enumerate(source.thing_classes)]
        self.images, self.truth, self.found = [], [], []

    def add(self, truth: Labelled, found: Instances) -> None:
        image = len(self.images) + 1
        self.images.append({"id": image, "height": truth.image.shape[0], "width": truth.image.shape[1]})
        encoded = mask_rle.encode(truth.masks)
        for rle, area, box, category in zip(encoded.rles, encoded.areas, encoded.boxes, truth.mask_classes):
            row = {
                "id": len(self.truth) + 1,
                "image_id": image,
                "category_id": int(category) + 1,
                "segmentation": rle,
                "area": float(area),
                "bbox": [float(x) for x in box],
                "iscrowd": 0,
            }
            self.truth.append(row)
        for rle, category, score in zip(mask_rle.encode(found.masks).rles, found.class_ids, found.scores):
            self.found.append({"image_id": image, "category_id": int(category) + 1, "segmentation": rle, "score": float(score)})

    def result(self) -> dict:
        precision = _coco_precision(self.images, self.categories, self.truth, self.found, "segm")
        return {"ap": precision[0], "ap50": precision[1]}


class Pose:
    """PCK@0.1 of the longer side of the figure's box over labelled joints, and OKS-AP with one tolerance for every joint."""

    TOLERANCE = 0.1  # pixels a joint may miss, as a share of the box
    OKS_SIGMA = 0.072  # COCO's mean over its body joints

    def __init__(self, source: Source):
        self.joints, self.right, self.total = source.joints, np.zeros(len(source.joints)), np.zeros(len(source.joints))
        self.categories = [{"id": 1, "name": "person", "keypoints": list(source.joints), "skeleton": []}]
        self.images, self.truth, self.found = [], [], []

    def add(self, truth: Labelled, found: Keypoints) -> None:
        image = len(self.images) + 1
        self.images.append({"id": image, "height": truth.image.shape[0], "width": truth.image.shape[1]})
        for points, box, area in zip(truth.keypoints, truth.keypoint_boxes, truth.keypoint_areas):
            flat = points.copy()
            flat[points[:, 2] == 0] = 0
            count = int((points[:, 2] > 0).sum())
            row = {
                "id": len(self.truth) + 1,
                "image_id": image,
                "category_id": 1,
                "keypoints": flat.ravel().tolist(),
                "num_keypoints": count,
                "area": float(area),
                "bbox": box.tolist(),
                "iscrowd": 0,
            }
            self.truth.append(row)
        for points, score in zip(found.points, found.scores):
            self.found.append({"image_id": image, "category_id": 1, "keypoints": points.astype(float).ravel().tolist(), "score": float(score)})
        if len(truth.keypoints):
            person = int(np.argmax(truth.keypoint_areas))
            labelled = truth.keypoints[person, :, 2] > 0
            reach = self.TOLERANCE * truth.keypoint_boxes[person, 2:].max()
            self.total += labelled
            if len(found.points):
                miss = np.linalg.norm(found.points[0, :, :2] - truth.keypoints[person, :, :2], axis=1)
                self.right += labelled & (miss <= reach) & (found.visibility[0] > 0)

    def result(self) -> dict:
        sigmas = np.full(len(self.joints), self.OKS_SIGMA)
        precision = _coco_precision(self.images, self.categories, self.truth, self.found, "keypoints", sigmas)
        per_joint = {name: float(right / total) for name, right, total in zip(self.joints, self.right, self.total) if total}
        return {"pck": float(self.right.sum() / max(self.total.sum(), 1)), "oks_ap": precision[0], "per_joint": per_joint}


def _coco_precision(images: list, categories: list, truth: list, found: list, kind: str, sigmas: np.ndarray | None = None) -> tuple[float, float]:
    """AP over 0.50:0.95 and at 0.50 as pycocotools computes them; 0 where nothing was found."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not found:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": truth}
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(found), kind)
        if sigmas is not None:
            judge.params.kpt_oks_sigmas = sigmas
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


class OpenVocabulary:
    """Mean over classes of the intersection over union of each class word asked for, on images that show it, and how often absence is seen."""

    def __init__(self, source: Source):
        self.things = source.thing_classes
        self.both, self.either = np.zeros(len(self.things)), np.zeros(len(self.things))

    def add(self, truth: Labelled, found: SemanticMap) -> None:
        for k, name in enumerate(self.things):
            here = truth.masks[truth.mask_classes == k].any(0) if (truth.mask_classes == k).any() else np.zeros(truth.image.shape[:2], bool)
            seen = found.labels == found.classes.index(name) if name in found.classes else np.zeros_like(here)
            self.both[k] += (here & seen).sum()
            self.either[k] += (here | seen).sum()

    def result(self) -> dict:
        iou = self.both / np.maximum(self.either, 1)
        return {"miou": float(iou[self.either > 0].mean()), "per_class": {name: float(value) for name, value in zip(self.things, iou)}}


METRICS = {"semantic": Semantic, "instance": Instance, "depth": Depth, "pose": Pose, "open-vocabulary": OpenVocabulary}
