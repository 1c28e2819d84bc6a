"""A run as the data set of supervision and of FiftyOne: what these are handed, as stand-ins hear it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from rendered import rendered, write_run

from datasetdm_fast import open_run
from datasetdm_fast.errors import Missing


class Heard(dict):
    """What a constructor was called with."""

    def __init__(self, *arguments, **named):
        super().__init__(named | ({"arguments": arguments} if arguments else {}))


class HeardDataset(Heard):
    def add_samples(self, samples):
        self["samples"] = samples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    write_run(path, 6, 64)
    return open_run(path)


@pytest.mark.parametrize("library", ["supervision", "fiftyone"])
def test_a_library_that_is_not_there_is_named(run, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Missing, match=f"{library} is not installed"):
        getattr(run, f"to_{library}")()


def test_supervision_gets_boxes_masks_and_classes(run, monkeypatch):
    detections = type("Detections", (Heard,), {"empty": staticmethod(lambda: Heard(xyxy=np.zeros((0, 4))))})
    stand_in = SimpleNamespace(Detections=detections, DetectionDataset=Heard)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    found = run.to_supervision()
    assert len(found["images"]) == 6 and all(path.endswith(".png") for path in found["images"])
    for k, path in enumerate(found["images"]):
        truth, told = rendered(k).annotations["instance"], found["annotations"][path]
        assert len(told["xyxy"]) == len(truth.masks)
        for box, mask, kind, number in zip(told["xyxy"], truth.masks, told["class_id"], truth.class_ids):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert found["classes"][kind] == truth.classes[number]


def test_fiftyone_gets_every_label_in_shares_of_the_sides(run, monkeypatch):
    kinds = ("Sample", "Detection", "Detections", "Heatmap", "Keypoint", "Keypoints", "Segmentation")
    stand_in = SimpleNamespace(Dataset=HeardDataset, **dict.fromkeys(kinds, Heard))
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    found = run.to_fiftyone("mine")
    assert found["arguments"] == ("mine",) and len(found["samples"]) == 6
    for k, told in enumerate(found["samples"]):
        truth = rendered(k).annotations
        assert told["prompt"] == rendered(k).request.prompt and told["sample_id"] == f"{k:08d}"
        assert told["semantic"]["mask_path"].endswith(f"semantic/{k:08d}.png")
        assert told["open_vocabulary"]["mask_path"].endswith(f"open_vocabulary/{k:08d}.png")
        assert np.abs(told["depth"]["map"] - truth["depth"].metres).max() < 0.001
        for thing, mask in zip(told["instance"]["detections"], truth["instance"].masks, strict=True):
            left, top, width, height = (round(64 * part) for part in thing["bounding_box"])
            assert np.array_equal(thing["mask"], mask[top : top + height, left : left + width])
            assert thing["mask"].sum() == mask.sum()
        for person, points in zip(told["pose"]["keypoints"], truth["pose"].points, strict=True):
            there = ~np.isnan(np.array(person["points"])[:, 0])
            assert np.allclose(np.array(person["points"])[there] * 64, points[there, :2], atol=1e-4)
