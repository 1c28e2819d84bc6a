"""Models of every family through the commands: killed, in two processes, in batches, and taught."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_pipelines
from skips import IS_LONG, long_test
from tiny_pipelines import SIZE

from datasetdm_fast import Pipeline, evaluate, generate, label, open_run, train

# family -> sizes of its tiny pipeline, none of them those of other tests; flags of generate
FAMILIES = {
    "sdxl": ({"width": 64, "depths": (0, 2, 1)}, ["--guidance", "4"]),
    "sd3": ({"width": 64, "layers": 4, "has_t5": False}, ["--guidance", "4"]),
    "flux1": ({"width": 64, "layers": 3, "singles": 1, "is_dev": True}, ["--guidance", "3"]),
    "flux2-klein": ({"width": 64, "layers": 2, "singles": 1}, []),
    "z-image": ({"width": 64, "layers": 3}, ["--guidance", "2"]),
    "qwen-image": ({"width": 64, "layers": 1}, ["--guidance", "3"]),
}
SHORT = "sd3"  # the only one of make test
PROMPT = "a photo of the cat, the photo of a house"


@pytest.fixture(params=FAMILIES if IS_LONG else [SHORT], scope="module")
def model(request, tmp_path_factory):
    sizes, flags = FAMILIES[request.param]
    folder = tiny_pipelines.save(tmp_path_factory.mktemp(request.param) / "model", request.param, **sizes)
    return ["--model", str(folder), "--engine", "torch", "--size", str(SIZE), "--quiet"], flags


def drawing(model, number):
    line, flags = model
    made = [*line, *flags, "--decoder", "random", "--task", "semantic,depth", "--prompts", PROMPT, "--steps", "3"]
    made += ["--labeller", "decoder,attention", "--classes", "cat,house"]
    return [*made, "--number", str(number), "--force-domain"]


def files(run):
    return {path.relative_to(run): path.read_bytes() for path in run.glob("*/*.png")}


@long_test
def test_a_kill_two_processes_and_batches_of_five(model, tmp_path):
    line = [*drawing(model, 5), "--batch-size", "1"]
    whole, killed, pair, batch = (tmp_path / name for name in ("whole", "killed", "pair", "batch"))
    assert generate.main([*line, "--out", str(whole)]) == 0
    assert len(files(whole)) >= 20

    command = [sys.executable, "-m", "datasetdm_fast.generate", *line, "--out", str(killed)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not [*killed.glob("images/*.png")]:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert generate.main([*line, "--out", str(killed)]) == 0
    assert files(killed) == files(whole)

    assert generate.main([*line, "--ranks", "2", "--out", str(pair)]) == 0
    assert files(pair) == files(whole)

    assert generate.main([*drawing(model, 5), "--batch-size", "5", "--out", str(batch)]) == 0
    with open_run(whole) as alone, open_run(batch) as together:
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one.image.astype(int) - other.image.astype(int)).max() <= 1
            for label in ("semantic", "attention"):
                assert (getattr(one, label).labels != getattr(other, label).labels).mean() < 0.01
            np.testing.assert_allclose(one.depth.metres, other.depth.metres, rtol=1e-2, atol=1e-2)


def test_a_decoder_is_trained_and_labels_runs_and_pictures(model, tmp_path, capsys):
    line, flags = model
    taught = ["--decoder", str(tmp_path / "decoder"), "--task", "semantic"]
    lesson = ["--data", "demo:4", "--steps", "4", "--batch-size", "2", "--draws", "1", "--folds", "no"]
    assert train.main([*line, *lesson, "--task", "semantic", "--out", str(tmp_path / "decoder")]) == 0
    capsys.readouterr()
    assert evaluate.main([*line, *taught, "--data", "demo:2@100", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["semantic"]["miou"] <= 1

    made = [*line, *flags, *taught, "--prompts", PROMPT, "--steps", "3", "--number", "2", "--force-domain"]
    assert generate.main([*made, "--out", str(tmp_path / "run")]) == 0
    assert label.main([str(tmp_path / "run" / "images"), *line, *taught, "--out", str(tmp_path / "labels")]) == 0
    with open_run(tmp_path / "run") as run, open_run(tmp_path / "labels") as labels:
        assert [sample.semantic.labels.shape for sample in labels] == [sample.semantic.labels.shape for sample in run]
        images = [sample.image for sample in run]
    pipe = Pipeline.from_pretrained(line[1], engine="torch", size=SIZE)
    levels = pipe.features(images[0], PROMPT)
    assert list(levels) == ["low", "mid", "high", "highest"] and all(
        level.isfinite().all() for level in levels.values()
    )
