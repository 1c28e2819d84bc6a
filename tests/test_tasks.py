"""From raw tensors to labels: DatasetDM's rules on hand-made logits, our own formats, a batch against its images."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import upstream_rules
from stub_engine import Tokenizer

from datasetdm_fast.config import TASKS as NAMES
from datasetdm_fast.data import Request
from datasetdm_fast.engine.decoders.config import upstream
from datasetdm_fast.engine.labels import LABEL_KINDS, class_tables
from datasetdm_fast.engine.labels.class_tables import ClassWord
from datasetdm_fast.engine.loop import labelling
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.engine.tasks import TASKS, captions, instance, open_vocabulary, pose, semantic
from datasetdm_fast.training import page
from datasetdm_fast.training.evaluation.metrics import METRICS

pytestmark = pytest.mark.core

SIZE = 32
ON, OFF = 20.0, -20.0  # logits of a sure pixel
CLASSES = ("wall", "ball", "cone")


def planes(*boxes, size=SIZE):
    """Mask logits [1, N, size, size], on inside each box (top, left, bottom, right); None is an empty mask."""
    masks = torch.full((1, len(boxes), size, size), OFF)
    for n, box in enumerate(boxes):
        if box:
            masks[0, n, box[0] : box[2], box[1] : box[3]] = ON
    return masks


def sure(*ids, count=3, height=20.0):
    """Class logits [1, N, K + 1], one sure class a query; None is "no object"."""
    logits = torch.zeros(1, len(ids), count + 1)
    for n, k in enumerate(ids):
        logits[0, n, count if k is None else k] = height
    return logits


def raw(logits, masks):
    return {"pred_logits": logits, "pred_masks": masks}


def test_every_task_has_a_module():
    assert tuple(TASKS) == NAMES
    assert set(LABEL_KINDS) == {*NAMES, "attention"}  # which needs no decoder


# ---- semantic


def test_semantic_follows_the_masks():
    config = upstream("segmentation", classes=CLASSES, min_area=0)
    (label,) = TASKS["semantic"].postprocess(raw(sure(0, 2), planes((0, 0, 32, 16), (0, 16, 32, 32))), config, SIZE)
    assert label.labels.dtype == np.uint8 and label.classes == CLASSES
    assert (label.labels[:, :16] == 0).all() and (label.labels[:, 16:] == 2).all()
    assert label.confidence.dtype == np.float32 and (label.confidence > 0.999).all() and (label.confidence <= 1).all()


def test_semantic_small_classes_vanish_except_class_zero():
    masks = planes((0, 0, 32, 16), (0, 16, 10, 26), (16, 16, 26, 26))  # 512, 100 and 100 pixels
    logits = sure(2, 1, 0)
    kept = upstream_rules.labels(logits, masks, min_area=99)[0]
    assert (kept[0:10, 16:26] == 1).all()
    dropped = upstream_rules.labels(logits, masks, min_area=101)[0]
    assert set(dropped.unique().tolist()) == {0, 2}
    assert (dropped[16:26, 16:26] == 0).all() and (dropped[:, :16] == 2).all()


def test_semantic_area_counts_only_values_above_one_half():
    logits = sure(1)
    masks = torch.zeros(1, 1, SIZE, SIZE)  # sigmoid one half exactly: evidence of at most one half everywhere
    assert (upstream_rules.labels(logits, masks, min_area=1) == 0).all()
    assert (upstream_rules.labels(logits, masks + 0.1, min_area=1) == 1).all()


def test_semantic_area_scales_with_the_image():
    assert semantic.scaled_area(5000, 512) == 5000
    config = upstream("segmentation", classes=CLASSES)  # 5000 of 512 x 512 are 19.5 pixels here
    for side, present in ((4, False), (5, True)):
        (label,) = TASKS["semantic"].postprocess(
            raw(sure(0, 1), planes((10, 0, 32, 32), (0, 0, side, side))), config, SIZE
        )
        assert (label.labels == 1).any() == present


def test_semantic_area_is_the_least_that_is_kept():
    config = upstream("segmentation", classes=CLASSES, min_area=4096)  # of 512 x 512: 16 pixels here
    for columns, present in ((4, True), (3, False)):
        masks = planes((4, 0, 32, 32), (0, 0, 4, columns)) * 10  # so sure that every probability is exactly 0 or 1
        (label,) = TASKS["semantic"].postprocess(raw(sure(0, 1, height=200.0), masks), config, SIZE)
        assert (label.labels == 1).any() == present


def test_semantic_confidence_is_the_share_of_all_evidence():
    config = upstream("segmentation", classes=CLASSES, min_area=0)
    logits, masks = sure(0, 1), planes((0, 0, 32, 32), (0, 0, 32, 32))
    masks[0, 1] = math.log(0.25 / 0.75)  # a quarter
    (label,) = TASKS["semantic"].postprocess(raw(logits, masks), config, SIZE)
    assert (label.labels == 0).all() and label.confidence == pytest.approx(1 / 1.25, rel=1e-4)


def test_semantic_ties_go_to_the_lowest_id():
    logits = torch.full((1, 1, 4), 1.0)
    assert (upstream_rules.labels(logits, planes((0, 0, 32, 32)), min_area=0) == 0).all()
    logits[0, 0, 0] = -20
    assert (upstream_rules.labels(logits, planes((0, 0, 32, 32)), min_area=0) == 1).all()


def test_semantic_without_any_object():
    config = upstream("segmentation", classes=CLASSES)
    (label,) = TASKS["semantic"].postprocess(raw(sure(None), planes(None)), config, SIZE)
    assert (label.labels == 0).all() and np.isfinite(label.confidence).all()


# ---- instance


def test_upstream_instance_score():
    logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]])
    masks = torch.full((1, 2, 2, 2), -1.0)
    masks[0, 0, 0] = torch.tensor([1.0, 2.0])
    found, classes, scores = upstream_rules.instances(logits, masks, 4)
    probability = logits.softmax(-1)[0, :, :2]
    inside = (1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(-2))) / (2 + 1e-6)
    by_pair = {
        (0 if mask.any() else 1, int(k)): float(score) for mask, k, score in zip(found[0], classes[0], scores[0])
    }
    assert by_pair.keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for k in range(2):
        assert by_pair[0, k] == pytest.approx(float(probability[0, k]) * inside, rel=1e-6)
        assert by_pair[1, k] == 0  # an empty mask scores nothing and divides by no zero
    assert upstream_rules.instances(logits, masks, 1)[1].tolist() == [[1]]
    assert len(upstream_rules.instances(logits, masks, 100)[2][0]) == 4


def test_upstream_instances_kept():
    scores = torch.linspace(0.3, 0.9, 31)[None]
    kept = upstream_rules.kept(scores)
    assert kept.sum() == 20 and kept[0, 11:].all()
    assert upstream_rules.kept(torch.tensor([[0.4, 0.39999, 0.5]])).tolist() == [[True, False, True]]


def test_instances_keep_parts_and_holes_and_drop_doubles():
    config = upstream("segmentation", task="instance", classes=CLASSES, min_area=0)
    masks = planes((0, 0, 12, 12), (0, 0, 12, 11), (20, 20, 30, 30), None, (0, 20, 8, 28))
    masks[0, 0, 4:6, 4:6] = OFF  # a hole
    masks[0, 0, 28:31, 0:4] = ON  # a second part
    logits = sure(1, 1, 2, 1, None)
    logits[0, 1] *= 0.2  # the double is less sure
    (found,) = TASKS["instance"].postprocess(raw(logits, masks), config, SIZE)
    assert sorted(found.class_ids.tolist()) == [1, 2] and found.masks.dtype == bool and found.classes == CLASSES
    mask = found.masks[found.class_ids.tolist().index(1)]
    assert mask[0, 0] and not mask[4, 4] and mask[29, 1]
    assert found.scores.dtype == np.float32 and (np.diff(found.scores) <= 0).all()


def test_masks_are_resized_a_few_at_a_time_to_the_same_bytes(monkeypatch):
    logits = torch.randn(7, 12, 12, generator=torch.Generator().manual_seed(0))
    whole, sizes = instance.large_masks(logits, SIZE), []
    resize = instance.resize
    monkeypatch.setattr(instance, "resize", lambda x, side: sizes.append(x.shape[1]) or resize(x, side))
    monkeypatch.setattr(instance, "MOST_PIXELS", 3 * SIZE**2)
    assert torch.equal(instance.large_masks(logits, SIZE), whole) and sizes == [3, 3, 1]


def test_suppression_follows_the_order_of_scores():
    """b is hidden by a, so c, which only b overlaps, stays."""
    masks = planes((0, 0, 1, 10), (0, 4, 1, 14), (0, 8, 1, 18)) > 0
    everything, classes = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.int64)
    assert instance.not_overlapping(masks, classes, everything, 0.4).tolist() == [[True, False, True]]
    assert instance.not_overlapping(masks, classes, everything, 0.5).tolist() == [[True, True, True]]
    others = torch.tensor([[False, True, True]])
    assert instance.not_overlapping(masks, classes, others, 0.4).tolist() == [[False, True, False]]


def test_fragments_of_a_thing_are_no_things():
    """A piece of its mask, or of its edge, of the same class and less sure; not what lies apart or is as large."""
    boxes = (0, 0, 12, 12), (4, 4, 8, 12), (0, 12, 12, 13), (0, 13, 12, 14), (0, 15, 3, 18), (13, 0, 25, 12)
    masks, heights = planes(*boxes), (6.0, 5.0, 4.0, 3.5, 3.0, 2.0)
    logits = torch.cat([sure(1, height=height) for height in heights], 1)
    assert things(logits, masks).masks.sum((1, 2)).tolist() == [144, 12, 9, 144]
    other = torch.cat([sure(1, height=6.0), sure(2, height=5.0)], 1)
    assert len(things(other, masks[:, :2]).masks) == 2, "a thing before one of another class"
    surer = torch.cat([sure(1, height=5.0), sure(1, height=6.0)], 1)
    assert len(things(surer, masks[:, :2]).masks) == 2, "the surer one is no fragment"


def test_no_instances():
    config = upstream("segmentation", task="instance", classes=CLASSES)
    for logits, masks in ((sure(None, None), planes((0, 0, 9, 9), None)), (sure(1, 2), planes(None, None))):
        (found,) = TASKS["instance"].postprocess(raw(logits, masks), config, SIZE)
        assert found.masks.shape == (0, SIZE, SIZE) and len(found.class_ids) == len(found.scores) == 0


def test_small_instances_are_dropped():
    config = upstream("segmentation", task="instance", classes=CLASSES, min_area=5000)
    (found,) = TASKS["instance"].postprocess(raw(sure(1, 2), planes((0, 0, 4, 4), (10, 10, 15, 15))), config, SIZE)
    assert found.class_ids.tolist() == [2]


def things(logits, masks, **choices):
    """The one image's instances, with nothing dropped for its score or size unless asked."""
    choices = {"min_area": 0, "score_threshold": 0.0, **choices}
    config = upstream("segmentation", task="instance", classes=CLASSES, **choices)
    (found,) = TASKS["instance"].postprocess(raw(logits, masks), config, SIZE)
    return found


def test_masks_that_overlap_by_exactly_the_threshold_are_two_things():
    masks = planes((0, 0, 2, 3), (0, 1, 2, 4))  # 4 common pixels of 8
    assert len(things(sure(1, 1), masks, overlap_threshold=0.5).masks) == 2
    assert len(things(sure(1, 1), masks, overlap_threshold=0.4999).masks) == 1
    assert len(things(sure(1, 1), masks.clamp(-1, 0.5), overlap_threshold=0.4999).masks) == 1, "faint ones, too"


def test_of_two_equally_sure_doubles_the_earlier_query_is_kept():
    found = things(sure(2, 1), planes((0, 0, 10, 9), (0, 0, 10, 10)), overlap_threshold=0.5)
    assert found.class_ids.tolist() == [2] and found.masks.sum() == 90


def test_the_surer_double_is_kept_whatever_its_query():
    logits = torch.cat([sure(1, height=1.0), sure(2, height=3.0)], 1)
    found = things(logits, planes((0, 0, 10, 10), (0, 0, 10, 10)), overlap_threshold=0.5)
    assert found.class_ids.tolist() == [2]


def ties_reversed(monkeypatch):
    """Every sort that is not asked to be stable gives equal values in the reverse order, which it may."""
    stable = torch.Tensor.sort

    def sort(values, dim=-1, descending=False, stable=False):
        if stable:
            return sort_stably(values, dim=dim, descending=descending, stable=True)
        found, order = sort_stably(values.flip(dim), dim=dim, descending=descending, stable=True)
        return found, values.shape[dim] - 1 - order

    sort_stably = stable
    monkeypatch.setattr(torch.Tensor, "sort", sort)


def test_equally_sure_things_keep_the_order_of_their_queries(monkeypatch):
    """On any device, so that a run that is resumed on another writes the same files."""
    ties_reversed(monkeypatch)
    found = things(sure(2, 0, 1), planes((0, 0, 4, 4), (8, 0, 12, 4), (16, 0, 20, 4)))
    assert found.class_ids.tolist() == [2, 0, 1]


def test_a_thing_of_exactly_the_score_threshold_is_kept():
    asked = sure(1, height=2.0), planes((0, 0, 4, 4))
    score = things(*asked).scores[0]
    assert len(things(*asked, score_threshold=float(score)).scores) == 1
    assert len(things(*asked, score_threshold=float(np.nextafter(score, np.float32(1)))).scores) == 0


def test_the_score_is_the_class_probability_times_the_mean_inside_the_mask():
    masks = planes((0, 0, 4, 4))
    masks[0, 0, 0, :4], masks[0, 0, 20, 20] = math.log(0.6 / 0.4), math.log(0.4 / 0.6)  # one pixel is outside
    found = things(sure(1, height=math.log(6)), masks)
    assert found.scores == pytest.approx([6 / 9 * (12 + 4 * 0.6) / 16], rel=1e-6) and found.masks.sum() == 16


@pytest.mark.parametrize(("columns", "present"), [(3, False), (4, True)])
def test_a_thing_of_exactly_the_least_area_is_kept(columns, present):
    found = things(sure(1), planes((0, 0, 4, columns)), min_area=4096)  # of 512 x 512: 16 pixels here
    assert len(found.masks) == present


def test_a_thing_of_one_pixel_is_one_and_an_empty_mask_is_none():
    found = things(sure(1, 2), planes((31, 31, 32, 32), None))
    assert found.class_ids.tolist() == [1] and np.argwhere(found.masks[0]).tolist() == [[31, 31]]
    half = torch.zeros(1, 1, SIZE, SIZE)  # a probability of one half is not inside
    assert len(things(sure(1), half).masks) == 0


def test_every_query_may_be_a_thing_but_no_more_than_a_hundred():
    masks = torch.full((1, 120, SIZE, SIZE), OFF)
    for n in range(120):
        masks[0, n, n // SIZE * 2, n % SIZE] = ON
    assert len(things(sure(*[1] * 120), masks).masks) == instance.MOST_INSTANCES == 100
    assert len(things(sure(*[1] * 99), masks[:, :99]).masks) == 99
    unsure = torch.tensor([[[1.0, 0.9, 0.8, 0.0]]])  # one query is one thing, however many classes it may be
    assert things(unsure, planes((0, 0, 4, 4)), overlap_threshold=1.0).class_ids.tolist() == [0]


# ---- open vocabulary


def word_logits(*heights):
    """Class logits [1, K, 1, 3] of one query a word."""
    return torch.tensor([[0.0, height, 0.0] for height in heights])[None, :, None]


def test_words_are_numbered_in_their_order():
    config = upstream("open-vocabulary")
    masks = planes((0, 0, 10, 10), (5, 5, 20, 20), (25, 25, 30, 30))[:, :, None]
    (label,) = TASKS["open-vocabulary"].postprocess(
        raw(word_logits(20, 3, -20), masks), config, SIZE, ("ball", "cone", "star")
    )
    assert label.classes == ("none", "ball", "cone", "star")
    assert (
        label.labels[0, 0] == 1 and label.labels[7, 7] == 1 and label.labels[15, 15] == 2
    )  # the surer word keeps what both claim
    assert label.labels[27, 27] == 0 and label.confidence[27, 27] > 0.99
    assert label.confidence[15, 15] == pytest.approx(float(torch.tensor([0.0, 3.0, 0.0]).softmax(-1)[1]), rel=1e-4)


def test_more_words_than_a_label_file_holds_are_told_apart():
    asked, image = tuple(f"word {k}" for k in range(300)), np.zeros((SIZE, SIZE, 3), np.uint8)
    logits, masks = torch.full((1, 300, 1, 3), OFF), torch.full((1, 300, 1, SIZE, SIZE), OFF)
    logits[0, 299, 0, 1] = masks[0, 299, 0, :4] = ON
    (label,) = TASKS["open-vocabulary"].postprocess(raw(logits, masks), upstream("open-vocabulary"), SIZE, asked)
    assert set(np.unique(label.labels)) == {0, 300} and label.classes[300] == asked[299]
    source = LabelledSource(SIZE, 1)
    source.thing_classes = asked
    item = Labelled("0", image, "", masks=label.labels[None] == 300, mask_classes=np.array([299]))
    assert (TASKS["open-vocabulary"].truth(source, item).labels == label.labels).all()
    meter = METRICS["open-vocabulary"](source)
    meter.add(item, label)
    assert meter.result() == {"miou": 1.0, "per_class": {asked[299]: 1.0}}
    picture = np.array(LABEL_KINDS["open-vocabulary"].picture(page._recolour(source, label), image))
    assert f'rgb{tuple(picture[0, 0].tolist())}"></i>{asked[299]}' in page._legend("open-vocabulary", source)[0]


@pytest.mark.parametrize(("columns", "present"), [(3, False), (4, True)])
def test_a_word_of_exactly_the_least_area_is_kept(columns, present):
    config = upstream("open-vocabulary", min_area=4096, score_threshold=0.0)  # of 512 x 512: 16 pixels here
    (label,) = TASKS["open-vocabulary"].postprocess(
        raw(word_logits(20), planes((0, 0, 4, columns))[:, :, None]), config, SIZE
    )
    assert (label.labels == 1).sum() == (16 if present else 0)


@pytest.mark.parametrize(("least", "pixels"), [(4096, 0), (3072, 12)])  # 16 pixels here, and 12
def test_a_pixel_as_likely_outside_as_inside_is_none_of_a_word(least, pixels):
    config = upstream("open-vocabulary", min_area=least, score_threshold=0.0)
    masks = planes((0, 0, 4, 3))[:, :, None]
    masks[..., :4, 3] = 0.0
    (label,) = TASKS["open-vocabulary"].postprocess(raw(word_logits(20), masks), config, SIZE)
    assert label.labels.sum() == pixels


def test_a_pixel_of_no_word_is_as_sure_as_its_likeliest_word_is_not():
    masks = planes((0, 0, 8, 8), (8, 0, 16, 8))[:, :, None]
    masks[0, 0, 0, 20, 20], masks[0, 1, 0, 20, 20] = math.log(0.4 / 0.6), math.log(0.1 / 0.9)
    config = upstream("open-vocabulary", min_area=0, score_threshold=0.0)
    (label,) = TASKS["open-vocabulary"].postprocess(raw(word_logits(20, 20), masks), config, SIZE)
    assert label.labels[20, 20] == 0 and label.confidence[20, 20] == pytest.approx(0.6, abs=1e-6)


def test_a_word_of_one_pixel_is_found_and_an_empty_mask_is_none():
    config = upstream("open-vocabulary", min_area=0, score_threshold=0.0)
    masks = planes((31, 0, 32, 1), None)[:, :, None]
    (label,) = TASKS["open-vocabulary"].postprocess(raw(word_logits(20, 20), masks), config, SIZE)
    assert label.labels[31, 0] == 1 and label.labels.sum() == 1


def test_a_word_of_exactly_the_score_threshold_is_kept():
    logits, masks = word_logits(2), planes((0, 0, 8, 8))[:, :, None]
    (score,) = open_vocabulary.best_query(logits, masks)[0][0].numpy()
    for threshold, pixels in ((score, 64), (np.nextafter(score, np.float32(1)), 0)):
        config = upstream("open-vocabulary", min_area=0, score_threshold=float(threshold))
        (label,) = TASKS["open-vocabulary"].postprocess(raw(logits, masks), config, SIZE)
        assert label.labels.sum() == pixels


def test_the_query_that_answers_a_word_best_is_the_surest_inside_its_mask():
    logits = torch.tensor([[[[0.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 1.9, 0.0], [0.0, 3.0, 0.0]]]])  # of one word
    masks = planes((0, 0, 4, 4), (8, 8, 12, 12), (16, 16, 20, 20), None)[:, None]
    masks[0, 0, 1, 8:12, 8:12] = math.log(0.6 / 0.4)  # probable, but nowhere sure where
    scores, probability, mask = open_vocabulary.best_query(logits, masks)
    assert mask[0, 0, 17, 17] == ON and mask[0, 0, 9, 9] == OFF
    expected = math.exp(1.9) / (2 + math.exp(1.9))
    assert float(probability) == pytest.approx(expected) and float(scores) == pytest.approx(expected, rel=1e-6)


def test_a_word_asked_twice_goes_to_the_first():
    masks = planes((0, 0, 10, 10), (0, 0, 10, 10))[:, :, None]
    (label,) = TASKS["open-vocabulary"].postprocess(raw(word_logits(20, 20), masks), upstream("open-vocabulary"), SIZE)
    assert set(np.unique(label.labels)) == {0, 1} and label.classes == ("none", "1", "2")


def test_one_word_without_its_own_axis():
    logits, masks = torch.tensor([[[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]]), planes((0, 0, 10, 10), (0, 0, 32, 32))
    (label,) = TASKS["open-vocabulary"].postprocess(raw(logits, masks), upstream("open-vocabulary"), SIZE)
    assert (label.labels[:10, :10] == 1).all() and label.labels.sum() == 100


def test_upstream_voc_mask():
    logits = torch.tensor([[[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]])
    label = upstream_rules.mask(logits, planes((0, 0, 10, 10), (0, 0, 32, 32)), 15)
    assert set(label.unique().tolist()) == {0, 15} and (label == 15).sum() == 100
    assert (upstream_rules.mask(logits, planes(None, None), 15) == 0).all()


# ---- depth


def test_depth_bytes_round_half_to_even_and_saturate():
    values = np.array([0.5, 1.5, 2.5, 255.6, 300.0, 0.0], np.float32)
    assert upstream_rules.depth_bytes(values * 80 / 256, 80).tolist() == [0, 2, 2, 255, 255, 0]
    assert upstream_rules.depth_bytes(values, 256).dtype == np.uint8


def test_depth_is_metres_at_image_size():
    (label,) = TASKS["depth"].postprocess(
        {"depth": torch.full((1, 1, 16, 16), 2.5)}, upstream("depth", max_depth=4.0), SIZE
    )
    assert (
        label.metres.shape == (SIZE, SIZE)
        and label.metres.dtype == np.float32
        and (label.metres == 2.5).all()
        and label.max_depth == 4.0
    )


# ---- pose


def bumps(*places, side=16, sigma=1.5):
    """Heatmaps [1, J, side, side] of a Gaussian around each (column, row) in cells; None is an absent joint."""
    axis = torch.arange(side, dtype=torch.float32)
    maps = [
        torch.zeros(side, side)
        if place is None
        else torch.exp(-((axis - place[0]) ** 2 + (axis[:, None] - place[1]) ** 2) / (2 * sigma**2))
        for place in places
    ]
    return torch.stack(maps)[None]


def test_upstream_keypoints_at_the_border():
    maps = torch.zeros(1, 6, 16, 16)
    for j, (column, row) in enumerate(((5, 5), (1, 5), (2, 5), (15, 5), (14, 14))):
        maps[0, j, row, column] = 1
    maps[0, 0, 5, 6], maps[0, 0, 4, 5], maps[0, 0, 6, 5] = 0.5, 0.2, 0.2
    maps[0, 5] = -1
    found, is_written = upstream_rules.keypoints(maps, 16)
    assert is_written.tolist() == [[True, False, True, False, True, False]]
    assert found[0, 0].tolist() == [5.25, 5.0, 1.0]
    assert found[0, 2].tolist() == [2.0, 5.0, 1.0]
    assert found[0, 4].tolist() == [14.0, 14.0, 1.0]
    assert found[0, 5].tolist() == [0.0, 0.0, -1.0]


def test_upstream_keypoints_take_the_first_maximum_of_the_resized_map():
    maps = torch.zeros(1, 1, 16, 16)
    maps[0, 0, 4, 4] = maps[0, 0, 4, 9] = 1
    found, _ = upstream_rules.keypoints(maps, 16)
    assert found[0, 0, :2].tolist() == [4.0, 4.0]
    resized, is_written = upstream_rules.keypoints(bumps((8, 6)), 64)
    assert is_written.all() and resized[0, 0, 0] == pytest.approx(8.5 * 4 - 0.5, abs=0.76)


def test_heatmap_places_are_found_between_cells():
    places = ((5.3, 7.8), (3.5, 9.1), (8.0, 8.0))
    config = upstream("heatmap", joints=("head", "neck", "hand"))
    (found,) = TASKS["pose"].postprocess({"heatmaps": bumps(*places)}, config, 128)
    expected = [[(x + 0.5) * 8, (y + 0.5) * 8] for x, y in places]
    assert np.abs(found.points[0, :, :2] - expected).max() < 0.05
    assert (
        found.points.dtype == np.float32
        and found.visibility.dtype == np.int64
        and found.visibility.tolist() == [[2, 2, 2]]
        and found.joints == config.joints
    )


def test_joints_at_the_border_flat_and_absent():
    config = upstream("heatmap", joints=("corner", "flat", "absent", "faint"), score_threshold=0.3)
    maps = bumps((0, 15), None, None, (6, 6))
    maps[0, 1], maps[0, 2] = 0.5, -1.0
    maps[0, 3] *= 0.2
    (found,) = TASKS["pose"].postprocess({"heatmaps": maps}, config, 128)
    assert found.points[0, 0, :2].tolist() == [4.0, 124.0]
    assert np.isfinite(found.points).all() and (found.points[..., 2] >= 0).all()
    assert found.visibility.tolist() == [[2, 2, 0, 1]]
    assert found.scores[0] == pytest.approx((1 + 0.5) / 2)


def test_a_joint_is_seen_from_the_threshold_and_guessed_from_half_of_it():
    heights = (0.3, 0.29, 0.15, 0.149, 0.0)
    config = upstream("heatmap", joints=tuple("abcde"), score_threshold=0.3)
    maps = torch.tensor(heights).view(1, 5, 1, 1).expand(1, 5, 16, 16)
    (found,) = TASKS["pose"].postprocess({"heatmaps": maps}, config, 128)
    assert found.visibility.tolist() == [[2, 1, 1, 0, 0]] and found.scores == pytest.approx([0.3])


def test_a_person_scores_the_mean_of_the_joints_that_are_seen():
    config = upstream("heatmap", joints=tuple("abc"), score_threshold=0.5)
    maps = torch.tensor([0.9, 0.5, 0.4]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    (found,) = TASKS["pose"].postprocess({"heatmaps": maps}, config, 128)
    assert found.scores == pytest.approx([0.7]) and found.points[0, :, 2] == pytest.approx([0.9, 0.5, 0.4])


def test_scores_stay_within_zero_and_one():
    config = upstream("heatmap", joints=("a", "b"), score_threshold=0.5)
    maps = torch.tensor([1.5, -0.5]).view(1, 2, 1, 1).expand(1, 2, 16, 16)
    (found,) = TASKS["pose"].postprocess({"heatmaps": maps}, config, 128)
    assert found.points[0, :, 2].tolist() == [1.0, 0.0] and found.visibility.tolist() == [[2, 0]]


def test_a_joint_on_the_last_pixels_lies_within_a_region_of_them():
    from datasetdm_fast.engine.labels import pose as labels

    region = np.zeros((4, 6), bool)
    region[3, 5] = True
    points = np.array([[5.2, 3.9], [6.0, 4.0], [4.9, 3.0], [5.0, 2.9], [5.2, 3.9]])
    assert labels._inside(points, np.array([2, 1, 2, 2, 0]), region).tolist() == [True, True, False, False, False]


def test_a_joint_leaves_its_cell_by_half_of_one_at_most():
    """A narrow ridge across the cells has its fitted top far away."""
    logarithms = torch.tensor([[-0.1, -1.0, -2.9], [-1.0, 0.0, -0.5], [-2.9, -0.5, -0.1]])
    maps = torch.full((1, 1, 16, 16), 1e-4)
    maps[0, 0, 6:9, 3:6] = logarithms.exp()  # the highest cell is column 4, row 7
    _, places = pose.summit(maps)
    assert places.tolist() == [[[4.5, 7.5]]]
    _, mirrored = pose.summit(maps.flip(2, 3))
    assert mirrored.tolist() == [[[10.5, 7.5]]]


@pytest.mark.parametrize(("column", "is_moved"), [(0, False), (1, True), (14, True), (15, False)])
@pytest.mark.parametrize("is_upright", [False, True])
def test_a_joint_in_the_outermost_cells_stays_in_their_middle(column, is_moved, is_upright):
    place = (column + 0.2, 7.2)
    _, places = pose.summit(bumps(place[::-1] if is_upright else place))
    found = places[0, 0].tolist()[::-1] if is_upright else places[0, 0].tolist()
    assert found == pytest.approx(place if is_moved else (column, 7), abs=1e-3)


def test_a_joint_between_cells_is_found_along_a_slant():
    """A slanted hill, whose sides say less about each axis than about both."""
    axis = torch.arange(16.0)
    dx, dy = axis - 6.3, (axis - 8.25)[:, None]
    maps = torch.exp(-(0.3 * dx**2 + 0.2 * dy**2 + 0.15 * dx * dy))[None, None]
    _, places = pose.summit(maps)
    assert places[0, 0].tolist() == pytest.approx([6.3, 8.25], abs=1e-3)


def test_a_map_too_faint_to_have_a_shape_is_not_fitted():
    height, places = pose.summit(bumps((5.3, 7.8)) * 1e-6)
    assert places.tolist() == [[[5.0, 8.0]]] and float(height) <= 1e-6


def test_a_joint_of_bins_is_the_mean_near_the_largest_of_them():
    logits = torch.full((1, 1, 64), -math.inf)
    logits[0, 0, [20, 23, 24]] = torch.tensor([0.5, 0.3, 0.2]).log()  # three bins away belong to it, four do not
    mass, places = pose.mean_bin(logits)
    assert float(mass) == pytest.approx(0.8) and float(places) == pytest.approx((20 * 0.5 + 23 * 0.3) / 0.8)
    sure_x = torch.full((1, 1, 64), -math.inf)
    sure_x[0, 0, 3] = 0.0
    for x, y in ((logits, sure_x), (sure_x, logits)):
        found = pose.joints({"x": x, "y": y}, 64)
        assert float(found[0, 0, 2]) == pytest.approx(0.8)  # the less sure of both axes


def test_no_person():
    config = upstream("heatmap", joints=("head",))
    (found,) = TASKS["pose"].postprocess({"heatmaps": torch.zeros(1, 1, 16, 16)}, config, 128)
    assert found.points.shape == (0, 1, 3) and found.visibility.shape == (0, 1) and len(found.scores) == 0


def test_simcc_bins():
    bins = torch.arange(64.0)
    x, y = -((bins - 20.4) ** 2)[None, None], -((bins - 63.0) ** 2)[None, None]
    assert upstream_rules.bins(x, y).tolist() == [[[20, 63]]]
    (found,) = TASKS["pose"].postprocess({"x": x, "y": y}, upstream("simcc", joints=("head",)), 64)
    assert (
        found.points[0, 0, 0] == pytest.approx(20.4, abs=0.02)
        and found.points[0, 0, 1] > 62
        and found.points[0, 0, 2] > 0.99
    )


# ---- every task


@pytest.mark.parametrize("task", NAMES)
def test_a_batch_equals_its_images(task):
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 3  # noqa: E731
    answers = {
        "semantic": {"pred_logits": draw(3, 9, 4), "pred_masks": draw(3, 9, 20, 20)},
        "instance": {"pred_logits": draw(3, 9, 4), "pred_masks": draw(3, 9, 20, 20)},
        "depth": {"depth": draw(3, 1, 16, 16).abs()},
        "pose": {"heatmaps": draw(3, 4, 16, 16)},
        "open-vocabulary": {"pred_logits": draw(3, 2, 9, 3), "pred_masks": draw(3, 2, 9, 20, 20)},
    }[task]
    kind = {"semantic": "segmentation", "instance": "segmentation", "pose": "heatmap"}.get(task, task)
    config = upstream(kind, task=task, classes=CLASSES, joints=("a", "b", "c", "d"), min_area=0, score_threshold=0.2)
    together = TASKS[task].postprocess(answers, config, SIZE)
    assert len(together) == 3
    for b, label in enumerate(together):
        (alone,) = TASKS[task].postprocess({name: value[b : b + 1] for name, value in answers.items()}, config, SIZE)
        for name, value in vars(label).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(value, getattr(alone, name), rtol=1e-5, atol=1e-6)
            else:
                assert value == getattr(alone, name)


# ---- classes that prompts name


def test_classes_a_prompt_does_not_name_are_ruled_out():
    config = upstream("segmentation", classes=CLASSES, named=("ball", "cone"), min_area=0)
    asked = raw(sure(2, 0, height=3.0), planes((0, 0, 32, 16), (0, 16, 32, 32)))
    asked["pred_logits"][0, 0, 1] = 2.0  # a cone, or perhaps a ball
    answers = {name: value.expand(4, *value.shape[1:]) for name, value in asked.items()}
    prompts = ("a red ball", "two cones", "balls beside a cone", "a photo of a street")
    found = TASKS["semantic"].postprocess(captions.held_to(answers, config, prompts), config, SIZE)
    assert [int(label.labels[0, 0]) for label in found] == [1, 2, 2, 2] and all(
        (label.labels[:, 16:] == 0).all() for label in found
    )
    things = TASKS["instance"].postprocess(captions.held_to(answers, config, prompts), config, SIZE)
    assert (
        [label.class_ids[0] for label in things] != [] and 2 not in things[0].class_ids and 1 not in things[1].class_ids
    )
    free = upstream("segmentation", classes=CLASSES, min_area=0)
    assert captions.held_to(answers, free, prompts) is answers


def test_attention_to_a_class_is_that_to_all_its_tokens_where_each_word_stands_in_the_prompt():
    config = upstream("segmentation", classes=("wall", "fire hydrant", "ball"), named=("fire hydrant", "ball"))
    attention = torch.arange(16.0).view(1, 8, 1, 2).expand(4, -1, -1, -1)  # token k has 2 k and 2 k + 1
    prompts = ("a fire hydrant beside a ball", "a fire hydrant", "a fire hydrant", "a street")
    present = [{"fire hydrant", "ball"}, {"fire hydrant", "ball"}, {"fire hydrant"}, set()]

    found = captions.word_attention(attention, config, prompts, present, Tokenizer())
    assert found[0, :, 0].tolist() == [[1, 1], pytest.approx([5 / 5.5, 6 / 5.5]), pytest.approx([12 / 12.5, 13 / 12.5])]
    assert (found[1:] == 1).all()


def test_small_things_lie_on_large_ones_in_a_truth_whichever_comes_first():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :1, :1] = masks[1] = True
    source = LabelledSource(4, 1)
    source.thing_classes, source.max_depth = ("ball", "cone"), 80.0
    for order in ([0, 1], [1, 0]):
        item = Labelled("0", np.zeros((4, 4, 3), np.uint8), "", masks=masks[order], mask_classes=np.array(order))
        truth = TASKS["open-vocabulary"].truth(source, item)
        assert truth.labels[0, 0] == 1 and (truth.labels == 2).sum() == 15 and truth.labels.dtype == np.uint8
    item = replace(item, depth=np.full((4, 4), 2.5, np.float32))
    depth = TASKS["depth"].truth(source, item)
    assert depth.max_depth == 80.0 and (depth.metres == 2.5).all()


def test_a_pixel_of_little_evidence_is_as_sure_as_one_of_much_where_one_class_has_it_all():
    config = upstream("segmentation", classes=CLASSES, min_area=0)
    (label,) = TASKS["semantic"].postprocess(raw(sure(1), torch.full((1, 1, SIZE, SIZE), -4.0)), config, SIZE)
    assert (label.labels == 1).all() and label.confidence == pytest.approx(1, abs=1e-4)


def test_words_that_a_decoder_keeps_name_its_classes():
    config = upstream("segmentation", classes=CLASSES, named=("ball", "cone"))
    own = replace(config, class_words=(ClassWord("ball", "globe", ("orb",)), ClassWord("", "", ("crystal globe",))))
    answers, prompts = raw(torch.zeros(3, 2, 4), planes(None)), ("two orbs", "a cone", "a crystal globe")

    def are_out(config):
        return [held[0, 1:3].isinf().tolist() for held in captions.held_to(answers, config, prompts)["pred_logits"]]

    assert are_out(own) == [[False, True], [True, False], [False, False]]
    assert are_out(config) == [[False, False], [True, False], [False, False]]


def test_what_is_not_ruled_out_is_answered_as_before():
    config = upstream("segmentation", classes=CLASSES, named=("ball", "cone"))
    logits = torch.arange(16.0).view(2, 2, 4)
    held = captions.held_to(raw(logits, planes(None)), config, ["a ball", "a street"])["pred_logits"]
    before, after = logits[0].softmax(-1), held[0].softmax(-1)
    assert (after[:, 2] == 0).all() and (held[1] == logits[1]).all()
    torch.testing.assert_close(after[:, 1], before[:, 1] + before[:, 2])  # not given to "no object"
    torch.testing.assert_close(after[:, [0, 3]], before[:, [0, 3]])


def test_a_run_holds_its_labels_to_the_prompts():
    config = upstream("segmentation", classes=CLASSES, named=("ball", "cone"), min_area=0)
    requests = [Request(k, prompt, k) for k, prompt in enumerate(("a ball", "a cone"))]
    answers = {
        name: value.expand(2, *value.shape[1:])
        for name, value in raw(sure(2, 0, height=3.0), planes((0, 0, 32, 16), (0, 16, 32, 32))).items()
    }
    found = labelling.postprocess(requests, answers, config, SimpleNamespace(size=SIZE))
    assert 2 not in found[0].labels and (found[1].labels[:, :16] == 2).all()


def test_words_a_prompt_does_not_name_are_not_found():
    config = upstream("open-vocabulary", classes=("ball",), named=("ball",))
    words = ("ball", "comet")  # the second was never taught, and is held to the prompt as well
    asked = raw(word_logits(20, 20), torch.cat([planes((0, 0, 8, 8)), planes((16, 16, 24, 24))])[None])
    (label,) = TASKS["open-vocabulary"].postprocess(
        captions.held_to(asked, config, ["a comet at night"], words), config, SIZE, words
    )
    assert set(np.unique(label.labels)) == {0, 2}


def test_a_class_counts_as_named_until_a_caption_leaves_it_out():
    seen = [
        (("ball", "cone"), "a red ball and a cone"),
        (("ball",), "two balls"),
        (("cone",), "a thing"),
        ((), "a ball"),
    ]
    assert class_tables.always_named(("ball", "cone", "star"), seen) == ("ball", "star")


def test_what_named_classes_have_is_divided_by_the_tenth_power_of_the_attention_to_their_words():
    config = upstream("segmentation", classes=CLASSES, named=("ball", "cone"))
    share = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.8, 0.0]])
    found = captions.shared_by_words(share, torch.tensor([[1e6, 1.0, 2.0]] * 2), config)  # no word names the wall
    ball, cone = 0.5 / 2**10, 0.3
    wanted = [[0.2, 0.8 * ball / (ball + cone), 0.8 * cone / (ball + cone)], [0.2, 0.8, 0.0]]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_the_attention_inside_a_mask_is_its_mean_there():
    values = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
    found = instance.inside_masks(values, planes((0, 0, 1, 2), (0, 1, 2, 2), size=2))
    assert found[0, 0].tolist() == pytest.approx([1.5, 4.0], rel=1e-5)


def test_words_are_taught_by_the_things_of_a_label_map_where_there_are_no_masks():
    source = SimpleNamespace(classes=("background", "wall", "ball", "cone"), thing_classes=("ball", "cone"))
    item = SimpleNamespace(masks=None, semantic=np.uint8([[1, 3], [2, 255]]), image=np.zeros((2, 2, 3), np.uint8))
    target = TASKS["open-vocabulary"].target(source, item)
    assert target["classes"].tolist() == [0, 1]
    assert target["masks"].astype(int).tolist() == [[[0, 0], [1, 0]], [[0, 1], [0, 0]]]
    label = TASKS["open-vocabulary"].truth(source, item)
    assert label.labels.tolist() == [[0, 2], [1, 0]] and label.classes == ("none", "ball", "cone")
    item.semantic[1, 0] = 0
    assert TASKS["open-vocabulary"].target(source, item)["classes"].tolist() == [1]


def test_the_page_of_a_training_tells_its_command_where_it_is_known():
    facts = {"data": "folder:photos", "command": "train --data 'a<b'"}
    told = page._facts(facts)
    assert "<code>train --data &#x27;a&lt;b&#x27;</code>" in told and "folder:photos" in told
    assert "<code>" not in page._facts({"data": "folder:photos"})


def test_a_picture_of_the_background_alone_shows_no_class_to_learn():
    shows = TASKS["semantic"].is_shown
    for names, first in (("background", "cup"), 1), (("none", "cup"), 1), (("wall", "cup"), 0), (("wall",), 2):
        source = SimpleNamespace(classes=names)
        assert [shows(source, {"classes": np.array(kinds, int)}) for kinds in ([], [0], [0, 1])] == [
            first < len(kinds) for kinds in ([], [0], [0, 1])
        ]


def test_a_fragment_is_seven_tenths_within_a_cell_of_a_thing_of_twice_its_area():
    whole = torch.zeros(16, 16, dtype=torch.bool)
    whole[:4, :6] = True  # 24 pixels
    for rows, columns, kind, stays in (
        (slice(0, 1), slice(0, 10), 0, False),  # 7 of 10 within the first and the cells around it
        (slice(0, 1), slice(1, 11), 0, True),
        (slice(0, 2), slice(0, 6), 0, False),  # 12 pixels
        (slice(0, 2), slice(0, 7), 0, True),
        (slice(0, 2), slice(0, 6), 1, True),  # of another class
    ):
        other = torch.zeros_like(whole)
        other[rows, columns] = True
        masks, kinds = torch.stack([whole, other])[None], torch.tensor([[0, kind]])
        found = instance.not_overlapping(masks, kinds, torch.ones(1, 2, dtype=torch.bool), 0.9)
        assert found.tolist() == [[True, stays]], (rows, columns, kind)


def test_semantic_targets_are_a_mask_of_each_class_but_of_no_ignored_pixel():
    target = TASKS["semantic"].target(None, SimpleNamespace(semantic=np.uint8([[0, 3], [255, 3]])))
    assert target["classes"].tolist() == [0, 3]
    assert target["masks"].astype(int).tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 1]]]


def test_the_truth_of_a_pose_holds_the_joints_and_which_of_them_are_seen():
    joints, limbs = ("head", "hand"), ((0, 1),)
    item = SimpleNamespace(keypoints=np.float32([[[3, 4, 2], [0, 0, 0]], [[5, 6, 1], [7, 8, 2]]]))
    label = TASKS["pose"].truth(SimpleNamespace(joints=joints, limbs=limbs), item)
    assert (label.points == item.keypoints).all() and label.visibility.tolist() == [[2, 0], [1, 2]]
    assert label.scores.tolist() == [1, 1] and (label.joints, label.limbs) == (joints, limbs)


def test_the_truth_of_instances_is_the_masks_of_an_item():
    masks, kinds = np.ones((2, 4, 4), bool), np.array([1, 0])
    truth = instance.InstanceTask().truth(
        SimpleNamespace(thing_classes=("a", "b")), SimpleNamespace(masks=masks, mask_classes=kinds)
    )
    assert truth.masks is masks and truth.class_ids.tolist() == [1, 0] and truth.scores.tolist() == [1, 1]
    assert truth.classes == ("a", "b")


def test_a_joint_counts_by_what_is_known_of_it_and_not_by_where_it_is():
    joints = np.float32([[[3, 0, 2], [4, 5, 0], [6, 7, 1]]])  # x, y; 0 not labelled, 1 hidden, 2 seen
    item = SimpleNamespace(keypoints=joints, keypoint_areas=np.ones(1))
    target = TASKS["pose"].target(None, item)
    assert target["weights"].tolist() == [True, False, True] and target["points"].tolist() == joints[0, :, :2].tolist()
