"""How true labels are: mIoU, COCO AP, AbsRel, PCK and OKS-AP, fed image by image; bootstrap intervals over the images.

A meter keeps what each image says, and `figures` combines the images by weights: all ones for the result, drawn counts for a bootstrap.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Collection, Sequence

import numpy as np

from datasetdm_fast.data import DepthMap, Instances, Keypoints, SemanticMap
from datasetdm_fast.decoders.config import COCO_JOINTS
from datasetdm_fast.errors import Refused
from datasetdm_fast.labels import mask_rle
from datasetdm_fast.readers import Labelled, Source

RECALLS = np.linspace(0, 1, 101)
LEVELS = np.linspace(0.5, 0.95, 10)  # overlap, of masks or of joints
MOST_TOGETHER = 4_000_000  # numbers a bootstrap holds at a time
BACKGROUND = ("background", "none")


class Meter:
    """What every task's figures share."""

    each = "per_class"

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns of the figure named `each`."""
        return ()

    @property
    def count(self) -> int:
        raise NotImplementedError

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Each figure [B] for weights [B, images]; the one named `each` is [B, classes], NaN where the truth does not show a class."""
        raise NotImplementedError

    def result(self) -> dict:
        """Every figure over all images, and those of each class there is."""
        if not self.count:
            return {}
        found = {name: values[0] for name, values in self.figures(np.ones((1, self.count))).items()}
        single = {name: float(np.nan_to_num(value)) for name, value in found.items() if name != self.each}
        return single | ({self.each: self._named(found[self.each])} if self.each in found else {})

    def draws(self, number: int, seed: int = 0) -> dict[str, np.ndarray]:
        """The figures [number] of as many bootstrap draws: images with replacement, as many as there are."""
        random = np.random.default_rng(seed)
        weights = random.multinomial(self.count, np.full(self.count, 1 / self.count), size=number).astype(np.float64)
        return self.figures(weights)

    def intervals(self, number: int = 500, level: float = 0.95, seed: int = 0) -> dict:
        """[low, high] of every figure that `result` gives, by the percentiles of bootstrap draws."""
        if not self.count:
            return {}
        bounds = {}
        for name, values in self.draws(number, seed).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a class that no draw shows
                low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
            if name == self.each:
                bounds[name] = {key: [float(low[k]), float(high[k])] for k, key in enumerate(self.columns) if np.isfinite(low[k])}
            else:
                bounds[name] = [float(np.nan_to_num(low)), float(np.nan_to_num(high))]
        return bounds

    def _named(self, values: np.ndarray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.columns, values) if np.isfinite(value)}


class _Overlap(Meter):
    """Intersection over union of each class from pixel counts over all images; with `unseen` classes also theirs, the others' and the harmonic mean."""

    def __init__(self, classes: Sequence[str], unseen: Collection[str] = ()):
        self.classes, self.rows = tuple(classes), []  # [3, K] int64 an image: both, either, truth
        self.unseen = np.array([name in unseen for name in self.classes], bool)
        self.is_background = np.array([name in BACKGROUND for name in self.classes], bool)

    @property
    def count(self) -> int:
        return len(self.rows)

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        both, either, there = np.einsum("bn,nik->ibk", weights, np.stack(self.rows).astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = np.where(self.counted(either, there), both / either, np.nan)
        found = {"miou": _mean(iou), "per_class": iou}
        if self.unseen.any():
            seen, unseen = _mean(iou[:, ~self.unseen & ~self.is_background]), _mean(iou[:, self.unseen])
            with np.errstate(invalid="ignore", divide="ignore"):
                found |= {"seen": seen, "unseen": unseen, "harmonic": np.where(seen + unseen > 0, 2 * seen * unseen / (seen + unseen), 0)}
        return found

    @property
    def columns(self) -> Sequence[str]:
        return self.classes

    def counted(self, either: np.ndarray, there: np.ndarray) -> np.ndarray:
        """Whether a class has a figure: where the truth shows it."""
        return there > 0


class Semantic(_Overlap):
    """Mean intersection over union over all pixels; 255 in the truth is left out, a class the data set does not name is no class."""

    def __init__(self, source: Source, unseen: Collection[str] = ()):
        super().__init__(source.classes, unseen)

    def add(self, truth: Labelled, found: SemanticMap) -> None:
        known, count = truth.semantic != 255, len(self.classes)
        if not known.any():
            return
        real, guess = truth.semantic[known].astype(np.int64), translation(found.classes, self.classes, 256)[found.labels[known]]
        both = np.bincount(real[real == guess], minlength=count)
        there, said = np.bincount(real, minlength=count), np.bincount(guess[guess >= 0], minlength=count)
        self.rows.append(np.stack([both, there + said - both, there]))


class OpenVocabulary(_Overlap):
    """The same of each class word asked for: asked of every image, so that naming what is not there costs too."""

    def __init__(self, source: Source, unseen: Collection[str] = ()):
        super().__init__(source.thing_classes, unseen)

    def counted(self, either: np.ndarray, there: np.ndarray) -> np.ndarray:
        return either > 0

    def add(self, truth: Labelled, found: SemanticMap) -> None:
        row = np.zeros((3, len(self.classes)), np.int64)
        known = np.ones(truth.image.shape[:2], bool) if truth.semantic is None else truth.semantic != 255
        for k, name in enumerate(self.classes):
            mine = truth.mask_classes == k
            here = truth.masks[mine].any(0) & known if mine.any() else np.zeros(truth.image.shape[:2], bool)
            seen = (found.labels == found.classes.index(name)) & known if name in found.classes else np.zeros_like(here)
            row[:, k] = (here & seen).sum(), (here | seen).sum(), here.sum()
        self.rows.append(row)


class Depth(Meter):
    """Mean absolute relative error, root mean squared error in metres and the shares within a factor 1.25, its square and its cube."""

    def __init__(self, source: Source):
        self.rows: list[tuple[float, ...]] = []

    @property
    def count(self) -> int:
        return len(self.rows)

    def add(self, truth: Labelled, found: DepthMap) -> None:
        known = truth.depth > 0
        if not known.any():  # nothing to compare with
            return
        real, guess = truth.depth[known].astype(np.float64), found.metres[known].astype(np.float64)
        ratio = np.maximum(guess / real, real / np.maximum(guess, 1e-6))
        within = (float(np.mean(ratio < 1.25**power)) for power in (1, 2, 3))
        self.rows.append((float(np.mean(np.abs(guess - real) / real)), float(np.mean((guess - real) ** 2)), *within))

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        means = weights @ np.array(self.rows) / weights.sum(1, keepdims=True)
        means[:, 1] = np.sqrt(means[:, 1])
        return dict(zip(("absrel", "rmse", "delta_1.25", "delta_1.25_2", "delta_1.25_3"), means.T))


class _Ranked(Meter):
    """Average precision as COCO defines it; pycocotools matches what was found with the truth, image by image."""

    kind = "segm"
    sigmas: np.ndarray | None = None

    def __init__(self, classes: Sequence[str]):
        self.classes = tuple(classes)
        self.categories = [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)]
        self.images, self.truth, self.found = [], [], []
        self._matched: tuple[int, list[_Ranking]] | None = None

    @property
    def count(self) -> int:
        return len(self.images)

    @property
    def columns(self) -> Sequence[str]:
        return self.classes

    def add_image(self, truth: Labelled) -> int:
        number = len(self.images) + 1
        self.images.append({"id": number, "height": truth.image.shape[0], "width": truth.image.shape[1]})
        return number

    def rankings(self) -> list[_Ranking]:
        """One ranking a class."""
        if self._matched is None or self._matched[0] != len(self.images):
            self._matched = (len(self.images), _rankings(self))
        return self._matched[1]

    def precision(self, weights: np.ndarray) -> np.ndarray:
        """AP [B, K, T] at every level of overlap, NaN for a class that the truth does not show."""
        return np.stack([ranking.precision(weights) for ranking in self.rankings()], 1)


class Instance(_Ranked):
    """Mask AP over IoU 0.50:0.95, and at 0.50 and 0.75; what lies in a crowd is neither right nor wrong."""

    def __init__(self, source: Source):
        super().__init__(source.thing_classes)

    def add(self, truth: Labelled, found: Instances) -> None:
        image = self.add_image(truth)
        for masks, classes, is_crowd in ((truth.masks, truth.mask_classes, 0), (truth.crowds, truth.crowd_classes, 1)):
            if masks is None or not len(masks):
                continue
            encoded = mask_rle.encode(masks)
            for rle, area, box, category in zip(encoded.rles, encoded.areas, encoded.boxes, classes):
                row = {"id": len(self.truth) + 1, "image_id": image, "category_id": int(category) + 1, "segmentation": rle}
                self.truth.append(row | {"area": float(area), "bbox": [float(x) for x in box], "iscrowd": is_crowd})
        number = translation(found.classes, self.classes, len(found.classes))
        for rle, category, score in zip(mask_rle.encode(found.masks).rles, found.class_ids, found.scores):
            if number[category] >= 0:
                self.found.append({"image_id": image, "category_id": int(number[category]) + 1, "segmentation": rle, "score": float(score)})

    def figures(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        precision = self.precision(weights)
        return {
            "ap": _mean(precision.mean(2)),
            "ap50": _mean(precision[..., 0]),
            "ap75": _mean(precision[..., 5]),
            "per_class": precision.mean(2),
        }


class Pose(_Ranked):
    """PCK@0.1 of the longer side of the figure's box over labelled joints, and OKS-AP: COCO's tolerance of each joint for COCO's joints, else one for all."""

    TOLERANCE = 0.1  # pixels a joint may miss, as a share of the box
    OKS_SIGMA = 0.072  # COCO's mean over its body joints
    kind = "keypoints"
    each = "per_joint"

    def __init__(self, source: Source):
        super().__init__(("person",))
        self.categories[0] |= {"keypoints": list(source.joints), "skeleton": []}
        self.joints, self.rows = source.joints, []  # [2, J] an image: right, labelled
        if source.joints != COCO_JOINTS:
            self.sigmas = np.full(len(source.joints), self.OKS_SIGMA)

    @property
    def columns(self) -> Sequence[str]:
        return self.joints

    def add(self, truth: Labelled, found: Keypoints) -> None:
        image = self.add_image(truth)
        for points, box, area in zip(truth.keypoints, truth.keypoint_boxes, truth.keypoint_areas):
            flat = points.copy()
            flat[points[:, 2] == 0] = 0
            row = {"id": len(self.truth) + 1, "image_id": image, "category_id": 1, "keypoints": flat.astype(float).ravel().tolist()}
            self.truth.append(row | {"num_keypoints": int((points[:, 2] > 0).sum()), "area": float(area), "bbox": box.astype(float).tolist(), "iscrowd": 0})
        for points, score in zip(found.points, found.scores):
            self.found.append({"image_id": image, "category_id": 1, "keypoints": points.astype(float).ravel().tolist(), "score": float(score)})
        counts = np.zeros((2, len(self.joints)))
        if len(truth.keypoints):
            person = int(np.argmax(truth.keypoint_areas))
            labelled = truth.keypoints[person, :, 2] > 0
            reach = self.TOLERANCE * truth.keypoint_boxes[person, 2:].max()
            counts[1] = labelled
            if len(found.points):
                miss = np.linalg.norm(found.points[0, :, :2] - truth.keypoints[person, :, :2], axis=1)
                counts[0] = labelled & (miss <= reach) & (found.visibility[0] > 0)
        self.rows.append(counts)

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
    """What was found of one class in all images, best first."""

    def __init__(self, scores: np.ndarray, is_right: np.ndarray, is_ignored: np.ndarray, image: np.ndarray, positives: np.ndarray):
        order = np.argsort(-scores, kind="stable")
        self.is_right, self.is_wrong = (is_right & ~is_ignored)[:, order], (~is_right & ~is_ignored)[:, order]  # [T, D]
        self.image, self.positives = image[order], positives  # [D], [images]

    def precision(self, weights: np.ndarray) -> np.ndarray:
        """AP [B, T] over 101 recalls."""
        step = max(1, MOST_TOGETHER // max(1, self.is_right.size))
        return np.concatenate([self._precision(weights[start : start + step]) for start in range(0, len(weights), step)])

    def _precision(self, weights: np.ndarray) -> np.ndarray:
        total = weights @ self.positives
        drawn = weights[:, self.image][:, None]
        right, wrong = np.cumsum(drawn * self.is_right, 2), np.cumsum(drawn * self.is_wrong, 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = right / total[:, None, None]
            precision = right / (right + wrong + np.spacing(1))
        best = np.maximum.accumulate(precision[..., ::-1], 2)[..., ::-1]
        best = np.concatenate([best, np.zeros((*best.shape[:2], 1))], 2)
        found = np.full(best.shape[:2], np.nan)
        for b in np.flatnonzero(total > 0):
            for t in range(best.shape[1]):
                found[b, t] = best[b, t, np.searchsorted(recall[b, t], RECALLS, side="left")].mean()
        return found


def _rankings(meter: _Ranked) -> list[_Ranking]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, found = COCO(), COCO()
        truth.dataset = {"info": {}, "images": meter.images, "categories": meter.categories, "annotations": meter.truth}
        truth.createIndex()
        if meter.found:
            found = truth.loadRes([dict(row) for row in meter.found])  # it writes into what it is given
        else:
            found.dataset = truth.dataset | {"annotations": []}
            found.createIndex()
        judge = COCOeval(truth, found, meter.kind)
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.params.maxDets = judge.params.maxDets[-1:]
        if meter.sigmas is not None:
            judge.params.kpt_oks_sigmas = meter.sigmas
        judge.evaluate()
    images, rankings = len(meter.images), []
    for k in range(len(meter.classes)):
        entries = [(number, entry) for number, entry in enumerate(judge.evalImgs[k * images : (k + 1) * images]) if entry is not None]
        positives = np.zeros(images)
        for number, entry in entries:
            positives[number] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        scores = np.concatenate([np.asarray(entry["dtScores"], float) for _, entry in entries] or [np.zeros(0)])
        is_right = np.concatenate([entry["dtMatches"] > 0 for _, entry in entries] or [np.zeros((len(LEVELS), 0), bool)], 1)
        is_ignored = np.concatenate([np.asarray(entry["dtIgnore"], bool) for _, entry in entries] or [np.zeros((len(LEVELS), 0), bool)], 1)
        where = np.concatenate([np.full(len(entry["dtScores"]), number) for number, entry in entries] or [np.zeros(0, np.int64)]).astype(np.int64)
        rankings.append(_Ranking(scores, is_right, is_ignored, where, positives))
    return rankings


def translation(said: Sequence[str], known: Sequence[str], length: int) -> np.ndarray:
    """For each number a decoder may say, the number of the same name in the data set, -1 where it has none."""
    table = np.full(max(length, len(said)), -1, np.int64)
    table[: len(said)] = [known.index(name) if name in known else -1 for name in said]
    return table


def check_names(task: str, said: Sequence[str], known: Sequence[str]) -> None:
    """Refuses to compare answers and truth that have no name in common."""
    if known and not set(said) & set(known):
        shown = ", ".join(said[:5]), ", ".join(known[:5])
        raise Refused(f"{task}: the decoder knows {shown[0]}, the data set {shown[1]}: no class in common", "Evaluate on data with the decoder's classes.")


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is a number."""
    is_there = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(is_there, values, 0).sum(-1) / is_there.sum(-1)


METRICS = {"semantic": Semantic, "instance": Instance, "depth": Depth, "pose": Pose, "open-vocabulary": OpenVocabulary}
