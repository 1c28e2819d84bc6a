"""Ranked detections: average precision as COCO computes it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from datasetdm_fast.data import Instances, Keypoints
from datasetdm_fast.engine.decoders.config import COCO_JOINTS, DecoderConfig
from datasetdm_fast.engine.labels import mask_rle
from datasetdm_fast.engine.pictures.labelled import EVERY_CLASS, Labelled, LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.evaluation.meter import Meter, check_names, mean, translation

RECALLS = np.linspace(0, 1, 101)
MOST_TOGETHER = 4_000_000  # numbers a bootstrap holds at a time


class _Ranked(Meter):
    """Average precision as COCO defines it; pycocotools matches predictions with the truth, image by image."""

    kind = "segm"
    sigmas: np.ndarray | None = None

    def __init__(self, classes: Sequence[str]):
        self.classes = tuple(classes)
        self.categories = [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)]
        self.images, self.truth, self.predicted = [], [], []
        self._matched: tuple[int, list[_Ranking]] = (-1, [])  # of how many images

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def columns(self) -> Sequence[str]:
        return self.classes

    def count_images(self) -> np.ndarray:
        return np.array([np.count_nonzero(ranking.positives) for ranking in self.rankings()])

    def add_image(self, truth: Labelled) -> int:
        number = len(self.images) + 1
        self.images.append({"id": number, "height": truth.image.shape[0], "width": truth.image.shape[1]})
        return number

    def add_truth(self, image: int, category: int, facts: dict[str, Any]) -> None:
        self.truth.append({"id": len(self.truth) + 1, "image_id": image, "category_id": category, **facts})

    def rankings(self) -> list[_Ranking]:
        """One ranking a class."""
        if self._matched[0] != len(self.images):
            self._matched = (len(self.images), _rankings(self))
        return self._matched[1]

    def precision(self, weights: np.ndarray) -> np.ndarray:
        """AP [B, K, T] at every level of overlap, NaN for a class that the truth does not show."""
        return np.stack([ranking.precision(weights) for ranking in self.rankings()], 1)


class Instance(_Ranked):
    """Mask AP over IoU 0.50:0.95, and at 0.50 and 0.75; predictions in crowds are ignored, and so are those of classes
    that an image was not searched for.
    """

    figure = "ap"
    held_out_figure = "ap50"
    shown_by_things = ("ap", "ap50")

    @classmethod
    def judging(cls, source: LabelledSource, config: DecoderConfig, unseen: Sequence[str] = ()) -> Instance:
        check_names(config.task, config.classes, source.thing_classes)
        return cls(source)

    @classmethod
    def reading(cls, config: DecoderConfig) -> DecoderConfig:
        return replace(config, score_threshold=0.0)  # AP ranks every candidate itself

    def __init__(self, source: LabelledSource):
        super().__init__(source.thing_classes)

    def add(self, truth: Labelled, predicted: Instances) -> None:
        image = self.add_image(truth)
        for masks, classes, is_crowd in ((truth.masks, truth.mask_classes, 0), (truth.crowds, truth.crowd_classes, 1)):
            if masks is None or not len(masks):
                continue
            encoded = mask_rle.encode(masks)
            for rle, area, box, category in zip(encoded.rles, encoded.areas, encoded.boxes, classes):
                shape = {"area": float(area), "bbox": [float(x) for x in box], "segmentation": rle}
                for kind in range(len(self.classes)) if category == EVERY_CLASS else (int(category),):
                    self.add_truth(image, kind + 1, shape | {"iscrowd": is_crowd})
        if truth.not_exhausted:  # a thing of these classes without a mask is ignored
            height, width = truth.image.shape[:2]
            (everywhere,) = mask_rle.encode(np.ones((1, height, width), bool)).rles
            whole = {"area": float(height * width), "bbox": [0.0, 0.0, width, height], "segmentation": everywhere}
            for kind in truth.not_exhausted:
                self.add_truth(image, kind + 1, whole | {"iscrowd": 1})
        number = translation(predicted.classes, self.classes, len(predicted.classes))
        if truth.searched is not None:  # as LVIS has it: whether the image shows other classes is unknown
            number[~np.isin(number, truth.searched)] = -1
        for rle, category, score in zip(mask_rle.encode(predicted.masks).rles, predicted.class_ids, predicted.scores):
            if number[category] >= 0:
                row = {"image_id": image, "category_id": int(number[category]) + 1}
                self.predicted.append(row | {"segmentation": rle, "score": float(score)})

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        precision = self.precision(weights)
        each = precision.mean(2)
        return {"ap": mean(each), "ap50": mean(precision[..., 0]), "ap75": mean(precision[..., 5]), "per_class": each}


class Pose(_Ranked):
    """PCK@0.1 of the longer side of the box over labelled joints, and OKS-AP with COCO's tolerances where they fit."""

    TOLERANCE = 0.1  # pixels a joint may miss, as a share of the box
    OKS_SIGMA = 0.072  # COCO's mean over its body joints
    kind = "keypoints"
    each = "per_joint"
    figure = held_out_figure = "pck"

    @classmethod
    def judging(cls, source: LabelledSource, config: DecoderConfig, unseen: Sequence[str] = ()) -> Pose:
        if config.joints != source.joints:
            shown = ", ".join(config.joints), ", ".join(source.joints)
            raise Refused(
                f"pose: the decoder has the joints {shown[0]}, the data set {shown[1]}",
                "Evaluate on data with its joints.",
            )
        return cls(source)

    def __init__(self, source: LabelledSource):
        super().__init__(("person",))
        self.categories[0] |= {"keypoints": list(source.joints), "skeleton": []}
        self.joints, self.rows = source.joints, []  # [2, J] an image: right, labelled
        if source.joints != COCO_JOINTS:
            self.sigmas = np.full(len(source.joints), self.OKS_SIGMA)

    @property
    def columns(self) -> Sequence[str]:
        return self.joints

    def add(self, truth: Labelled, predicted: Keypoints) -> None:
        image = self.add_image(truth)
        for points, box, area in zip(truth.keypoints, truth.keypoint_boxes, truth.keypoint_areas):
            shape = {"area": float(area), "bbox": box.astype(float).tolist(), "iscrowd": 0}
            keypoints = points.astype(float).ravel().tolist()
            joints = {"keypoints": keypoints, "num_keypoints": int((points[:, 2] > 0).sum())}
            self.add_truth(image, 1, shape | joints)
        for points, score in zip(predicted.points, predicted.scores):
            keypoints = points.astype(float).ravel().tolist()
            self.predicted.append({"image_id": image, "category_id": 1, "keypoints": keypoints, "score": float(score)})
        counts = np.zeros((2, len(self.joints)))
        if len(truth.keypoints):
            person = int(np.argmax(truth.keypoint_areas))
            labelled = truth.keypoints[person, :, 2] > 0
            reach = self.TOLERANCE * truth.keypoint_boxes[person, 2:].max()
            counts[1] = labelled
            if len(predicted.points):
                miss = np.linalg.norm(predicted.points[0, :, :2] - truth.keypoints[person, :, :2], axis=1)
                counts[0] = labelled & (miss <= reach) & (predicted.visibility[0] > 0)
        self.rows.append(counts)

    @property
    def telling(self) -> int:
        return sum(bool(labelled.any()) for _, labelled in self.rows)

    def count_images(self) -> np.ndarray:
        return np.stack([labelled > 0 for _, labelled in self.rows]).sum(0)

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        right, total = np.einsum("bn,nij->ibj", weights, np.stack(self.rows))
        precision = self.precision(weights)[:, 0]
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "pck": np.where(total.sum(1) > 0, right.sum(1) / total.sum(1), np.nan),
                "oks_ap": precision.mean(1),
                "oks_ap50": precision[:, 0],
                "per_joint": np.where(total > 0, right / total, np.nan),
            }


class _Ranking:
    """Predictions of one class in all images, best first."""

    def __init__(
        self, scores: np.ndarray, is_right: np.ndarray, is_ignored: np.ndarray, image: np.ndarray, positives: np.ndarray
    ):
        order = np.argsort(-scores, kind="stable")
        self.is_right, self.is_wrong = (is_right & ~is_ignored)[:, order], (~is_right & ~is_ignored)[:, order]  # [T, D]
        self.image, self.positives = image[order], positives  # [D], [images]

    def precision(self, weights: np.ndarray) -> np.ndarray:
        """AP [B, T] over 101 recalls."""
        step = max(1, MOST_TOGETHER // max(1, self.is_right.size))
        starts = range(0, len(weights), step)
        return np.concatenate([self._precision(weights[start : start + step]) for start in starts])

    def _precision(self, weights: np.ndarray) -> np.ndarray:
        total = weights @ self.positives
        counts = weights[:, self.image][:, None]
        right, wrong = np.cumsum(counts * self.is_right, 2), np.cumsum(counts * self.is_wrong, 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = right / total[:, None, None]
            precision = right / (right + wrong + np.spacing(1))
        best = np.maximum.accumulate(precision[..., ::-1], 2)[..., ::-1]
        best = np.concatenate([best, np.zeros((*best.shape[:2], 1))], 2)
        average = np.full(best.shape[:2], np.nan)
        for b in np.flatnonzero(total > 0):
            for t in range(best.shape[1]):
                average[b, t] = best[b, t, np.searchsorted(recall[b, t], RECALLS, side="left")].mean()
        return average


def _rankings(meter: _Ranked) -> list[_Ranking]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, predicted = COCO(), COCO()
        truth.dataset = {"info": {}, "images": meter.images, "categories": meter.categories, "annotations": meter.truth}
        truth.createIndex()
        if meter.predicted:
            predicted = truth.loadRes([dict(row) for row in meter.predicted])  # it writes into its argument
        else:
            predicted.dataset = truth.dataset | {"annotations": []}
            predicted.createIndex()
        evaluator = COCOeval(truth, predicted, meter.kind)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = evaluator.params.maxDets[-1:]
        if meter.sigmas is not None:
            evaluator.params.kpt_oks_sigmas = meter.sigmas
        evaluator.evaluate()
    images, rankings = len(meter.images), []
    for k in range(len(meter.classes)):
        shown = enumerate(evaluator.evalImgs[k * images : (k + 1) * images])
        entries = [(number, entry) for number, entry in shown if entry is not None]
        positives = np.zeros(images)
        for number, entry in entries:
            positives[number] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        none = np.zeros((len(evaluator.params.iouThrs), 0), bool)
        scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in entries)])
        is_right = np.concatenate([none, *(entry["dtMatches"] > 0 for _, entry in entries)], 1)
        is_ignored = np.concatenate([none, *(np.asarray(entry["dtIgnore"], bool) for _, entry in entries)], 1)
        where = np.repeat([number for number, _ in entries], [len(entry["dtScores"]) for _, entry in entries])
        rankings.append(_Ranking(scores, is_right, is_ignored, where.astype(np.int64), positives))
    return rankings
