"""Spliced runs: labels lie where their pictures are, the same bytes come out however it was interrupted."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from rendered import TASKS, write_run
from test_ledger import tree

from datasetdm_fast import audit as audit_command
from datasetdm_fast import drop, generate, splice
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.engine.labels import LABEL_KINDS, mask_rle
from datasetdm_fast.engine.labels.kind import LabelKind, Placement
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.runs.compositions.splice import sample_positions
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.reader import open_run

SIDE, NUMBER = 64, 12


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "run"
    write_run(path, NUMBER, SIDE)
    return path


@pytest.fixture(scope="module")
def spliced(source) -> Path:
    out = source.parent / "spliced"
    assert splice.main([str(source), "--grids", "2,3,1x2,2x3", "--number", "8", "--out", str(out), "--quiet"]) == 0
    return out


def placed(sample, source):
    """The samples of a grid, each with the rows and columns it fills."""
    rows, columns = map(int, sample.meta["grid"].split("x"))
    for (row, column), id in zip(itertools.product(range(rows), range(columns)), sample.meta["tiles"], strict=True):
        yield source[id], slice(row * SIDE, (row + 1) * SIDE), slice(column * SIDE, (column + 1) * SIDE)


def test_pictures_and_labels_are_those_of_the_source(source, spliced):
    run, whole = open_run(source), open_run(spliced)
    assert [sample.meta["grid"] for sample in whole] == ["2x2", "3x3", "1x2", "2x3"] * 2
    for sample in whole:
        masks, people = [], []
        for tile, rows, columns in placed(sample, run):
            assert (sample.image[rows, columns] == tile.image).all()
            assert (sample.semantic.labels[rows, columns] == tile.semantic.labels).all()
            assert (sample.semantic.confidence[rows, columns] == tile.semantic.confidence).all()
            assert (sample.open_vocabulary.labels[rows, columns] == tile.open_vocabulary.labels).all()
            assert (sample.depth.metres[rows, columns] == tile.depth.metres).all()
            for mask in tile.instances.masks:
                masks.append(np.zeros(sample.image.shape[:2], bool))
                masks[-1][rows, columns] = mask
            corner = [columns.start, rows.start]
            for points, seen in zip(tile.keypoints.points, tile.keypoints.visibility > 0):
                people.append(np.where(seen[:, None], points[:, :2] + corner, 0))
        assert sample.instances.masks.shape[0] == len(masks) and (sample.instances.masks == masks).all()
        assert np.allclose(
            sample.keypoints.points[..., :2].reshape(-1, len(world.JOINTS), 2),
            np.reshape(people, (-1, len(world.JOINTS), 2)),
            atol=1e-3,
        )
        assert set(sample.classes) == {word for tile, *_ in placed(sample, run) for word in tile.classes}


def test_the_folder_is_whole_and_names_its_source(source, spliced):
    report = audit(spliced)
    assert report.findings == [] and report.is_complete
    document = open_run(spliced).document
    assert document["model"] == open_run(source).document["model"]
    assert document["composition"]["source"]["path"] == str(source)
    assert "| model | Apache 2.0 |" in (spliced / "README.md").read_text()
    assert "Spliced from the run" in (spliced / "README.md").read_text()


def test_the_coco_file_has_unique_ids_and_the_sizes_of_the_pictures(spliced):
    coco = COCO(spliced / "instances.json")
    ids = [entry["id"] for entry in coco.dataset["annotations"]]
    assert len(ids) == len(set(ids)) > NUMBER
    for entry in coco.dataset["annotations"]:
        image = coco.imgs[entry["image_id"]]
        mask = coco.annToMask(entry)
        assert mask.shape == (image["height"], image["width"]) and mask.sum() == entry["area"]


def test_a_resized_grid_has_the_size_of_one_sample(source, tmp_path):
    out = tmp_path / "out"
    line = [str(source), "--grids", "2,3,8x8", "--number", "6", "--out", str(out), "--resize", "--quiet"]
    assert splice.main(line) == 0 and audit(out).findings == []
    for sample in open_run(out):
        assert sample.image.shape == (SIDE, SIDE, 3) and sample.instances.masks.shape[1:] == (SIDE, SIDE)
        for mask, kind in zip(sample.instances.masks, sample.instances.class_ids):
            named = sample.semantic.labels[mask] == kind + 2  # the renderer's maps agree pixel by pixel
            assert mask.any() and named.all()


def test_a_killed_run_resumes_to_the_same_bytes(source, spliced, tmp_path):
    out = tmp_path / "out"
    line = [str(source), "--grids", "2,3,1x2,2x3", "--number", "8", "--out", str(out), "--quiet"]
    assert splice.main([*line, "--limit", "3"]) == 0 and len(open_run(out)) == 3
    (out / "images" / "00000005.png").write_bytes(b"half")
    assert splice.main([*line, "--threads", "1"]) == 0
    assert tree(out) == tree(spliced) and audit(out).findings == []
    ledger = "state/ledger.sqlite"
    assert (out / ledger).read_bytes() == (spliced / ledger).read_bytes()


def test_kill_9_loses_nothing(source, tmp_path):
    lines = [[str(source), "--number", "96", "--out", str(tmp_path / name), "--quiet"] for name in "ab"]
    process = subprocess.Popen([sys.executable, "-m", "datasetdm_fast.splice", *lines[0]])
    while process.poll() is None and not (tmp_path / "a" / "images").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [splice.main(line) for line in lines] == [0, 0]
    assert tree(tmp_path / "a") == tree(tmp_path / "b") and audit(tmp_path / "a").findings == []


def test_a_run_that_is_stopped_before_its_first_picture_is_not_called_complete(source, tmp_path, capsys, monkeypatch):
    class Stopped(Interruption):
        is_stopping = staticmethod(lambda: True)

    monkeypatch.setattr(splice, "Interruption", Stopped)
    assert splice.main([str(source), "--number", "3", "--out", str(tmp_path / "spliced")]) == 0
    told = capsys.readouterr().err
    assert "0 of 3 samples are there; resume with" in told and "nothing to do" not in told


def test_a_damaged_sample_is_taken_out_and_made_again(spliced, source, tmp_path, capsys):
    out = Path(shutil.copytree(spliced, tmp_path / "out"))
    (out / "depth" / "00000001.png").unlink()
    assert audit_command.main([str(out), "--repair", "--quiet"]) == 4
    line = [str(source), "--grids", "2,3,1x2,2x3", "--number", "8", "--out", str(out), "--quiet"]
    assert splice.main(line) == 0 and tree(out) == tree(spliced)
    assert generate.main(["--out", str(out), "--only", "00000001"]) == 2
    assert "was made by splice" in capsys.readouterr().err


WRONG = [
    (["--grids", "1"], "'1' is not a grid of 2 to 8x8 pictures"),
    (["--grids", "9"], "'9' is not a grid"),
    (["--grids", "2x"], "'2x' is not a grid"),
    (["--grids", ","], "the list is empty"),
    (["--number", "0"], f"--number 0: expected 1 to {2**31 - 1}"),
    (["--limit", "-1"], "--limit -1: expected 0 or more"),
    (["--seed", str(2**63)], f"--seed {2**63}: expected "),
    (["--kept"], "has not been filtered"),
    (["--gird", "2"], "did you mean --grids?"),
]


@pytest.mark.parametrize("flags, said", WRONG, ids=lambda value: str(value)[:20])
def test_bad_input_is_refused_and_nothing_written(flags, said, source, tmp_path, capsys):
    assert splice.main([str(source), *flags, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_source_that_cannot_serve_is_refused(spliced, source, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert splice.main(out) == 2 and "RUN is missing" in capsys.readouterr().err
    assert splice.main([str(spliced), *out]) == 2 and "is itself spliced" in capsys.readouterr().err
    assert splice.main([str(tmp_path / "none"), *out]) == 2 and "not a run folder" in capsys.readouterr().err
    half = Path(shutil.copytree(source, tmp_path / "half"))
    (half / "state" / "seal.json").write_text("{}\n")
    assert splice.main([str(half), *out]) == 2 and "not finished" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert splice.main([str(source), "--out", str(spliced), "--seed", "5"]) == 2
    assert "seed: 0 there, 5 asked for" in capsys.readouterr().err


def test_a_spliced_sample_that_was_dropped_is_not_missing(source, tmp_path, capsys):
    line = [str(source), "--number", "3", "--out", str(tmp_path / "out")]
    assert splice.main([*line, "--quiet"]) == 0 and drop.main([str(tmp_path / "out"), "1", "--quiet"]) == 0
    capsys.readouterr()
    assert splice.main([*line, "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["complete"] and "resume with" not in told.err and len(open_run(tmp_path / "out")) == 2


def test_a_source_in_a_folder_whose_name_is_no_utf_8_serves(source, tmp_path, monkeypatch):
    run, out = tmp_path / "caf\udce9", tmp_path / "out"
    shutil.copytree(source, run)
    monkeypatch.setattr(sys, "argv", ["splice", str(run)])
    assert drop.main([str(run), "1", "--quiet"]) == 0
    assert splice.main([str(run), "--number", "2", "--out", str(out), "--quiet"]) == 0
    assert audit(run).findings == audit(out).findings == []


def test_a_damaged_source_is_refused(source, tmp_path, capsys):
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    shutil.copy(damaged / "depth" / "00000001.png", damaged / "depth" / "00000002.png")
    assert splice.main([str(damaged), "--grids", "3", "--out", str(tmp_path / "out"), "--quiet"]) == 4
    said = "depth/00000002.png is missing or has changed since it was written"
    assert said in capsys.readouterr().err
    (damaged / "depth" / "00000002.png").unlink()
    assert splice.main([str(damaged), "--grids", "3", "--out", str(tmp_path / "out"), "--quiet"]) == 4
    error = capsys.readouterr().err
    assert said in error and f"python -m datasetdm_fast.audit {damaged}" in error


def test_a_place_inside_of_a_run_is_refused(source, tmp_path, capsys):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    assert splice.main([str(source), "--number", "1", "--out", str(copy / "new"), "--quiet"]) == 2
    assert f"it lies inside the run folder {copy}" in capsys.readouterr().err and not (copy / "new").exists()


def test_grids_take_different_samples_where_there_are_enough():
    assert sample_positions(3, 4, 10) == sample_positions(3, 4, 10) != sample_positions(4, 4, 10)
    assert sample_positions(3, 4, 10) != sample_positions(-3, 4, 10)
    assert all(sorted(sample_positions(seed, 9, 9)) == list(range(9)) for seed in range(20))
    assert set(sample_positions(0, 64, 3)) <= {0, 1, 2}


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 2), (2, 1), (3, 3)])
def test_a_shifted_mask_is_the_mask_in_its_place(rows, columns):
    dice = np.random.default_rng(rows * 8 + columns)
    for density in (0, 0.02, 0.5, 0.98, 1):
        mask = dice.random((7, 5)) < density
        for row, column in itertools.product(range(rows), range(columns)):
            whole = np.zeros((7 * rows, 5 * columns), bool)
            whole[7 * row : 7 * row + 7, 5 * column : 5 * column + 5] = mask
            rle = mask_rle.encode(mask[None]).rles[0]
            assert mask_rle.shift(rle, 7 * row, 5 * column, whole.shape) == mask_rle.encode(whole[None]).rles[0]
    with pytest.raises(ValueError, match="does not fit"):
        mask_rle.shift(rle, 1, 0, (7, 5))


def test_scaling_takes_the_nearest_pixel():
    pixels = np.arange(36).reshape(6, 6)
    assert (Placement(6, 6, 0, 0, 2, 3, (2, 3)).scale(pixels) == [[7, 9, 11], [25, 27, 29]]).all()
    assert Placement(6, 6, 0, 0, 6, 6, (6, 6)).scale(pixels) is pixels


def test_a_joint_in_the_outer_half_of_a_border_pixel_keeps_its_place():
    person = {"keypoints": [-0.4, 63.3, 2, 63.45, -0.5, 1, 0, 0, 0], "bbox": [0, 0, 2, 2], "area": 4}
    moved = LABEL_KINDS["pose"].move(person, Placement(64, 64, 64, 128, 64, 64, (128, 192)))
    assert moved["keypoints"] == [127.6, 127.3, 2, 191.45, 63.5, 1, 0, 0, 0]


def test_every_label_kind_can_be_spliced():
    for kind in LABEL_KINDS.values():
        assert kind.roles or type(kind).move is not LabelKind.move
    assert set(LABEL_KINDS) == {*TASKS, "attention"}
