"""Student networks of transformers: each learns its task, a killed course ends in the same weights, arms are compared,
and what cannot be taught is refused before anything is written.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import LAYOUTS
from PIL import Image
from rendered import document, rendered, write_run
from safetensors.torch import load_file, save_file
from skips import IS_LONG, long_test

from bench.proof.students import answering, arms, command, course, student_data
from bench.proof.students.course import Course, NetworkTraining, taught
from bench.proof.students.examples import Examples, shared_vocabulary
from bench.proof.students.networks import NETWORKS, STUDENTS, open_network
from bench.proof.students.networks.weights import build
from bench.proof.students.worth import check_classes
from datasetdm_fast.data import IGNORE, Request, SemanticMap
from datasetdm_fast.engine.pictures.labelled import Labelled, LabelledSource
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.training import checkpoint
from datasetdm_fast.training.readers import open_data

SIDE = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("students") / "run"
    write_run(path, 4, SIDE)
    return path


@pytest.fixture(scope="module")
def scenes():
    return open_data("demo:4@1000", SIDE)


def training(name: str, scenes: LabelledSource, steps: int = 3, size: int = 4, seed: int = 0) -> NetworkTraining:
    network, vocabulary = open_network(name), student_data.vocabulary_of(scenes)
    some = Examples(scenes, vocabulary, network.task)
    parts = (vocabulary, [some], Course(steps=steps, batch_size=size, warmup=0.0), seed, CPU, torch.float32)
    return NetworkTraining(network, build(network, vocabulary, "tiny", SIDE, seed), *parts)


@pytest.mark.parametrize("name", NETWORKS if IS_LONG else NETWORKS[:1])
def test_every_network_learns_its_task(scenes, name, tmp_path):
    one = training(name, scenes, steps=8)
    views = one._views(0)
    one._views = lambda step: views  # the same images at every step
    losses = []
    model = taught(one, tmp_path, lambda step, loss: losses.append(loss))
    assert len(losses) == 8 and np.mean(losses[-2:]) < losses[0]
    names = one.network.names and dict(enumerate(one.network.names(one.vocabulary)))
    model.save_pretrained(tmp_path / "saved")
    if names:  # as transformers reads them
        assert type(model.config).from_pretrained(tmp_path / "saved").id2label == names and len(names) > 1
    found = answering.scored(one.network, model, one.sets[0], one.vocabulary, 2)
    assert found and all(np.isfinite(value) for value in found.values() if isinstance(value, float))


def test_a_killed_course_ends_in_the_same_weights(scenes, tmp_path, monkeypatch):
    whole = taught(training("segformer", scenes), tmp_path / "whole", lambda step, loss: None).state_dict()

    def killed(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught(training("segformer", scenes), tmp_path / "cut", killed, between=0.0)
    seen = []
    again = taught(training("segformer", scenes), tmp_path / "cut", lambda step, loss: seen.append(step)).state_dict()
    assert seen == [2, 3] and all(torch.equal(whole[name], again[name]) for name in whole)
    other = taught(training("segformer", scenes, seed=1), tmp_path / "other", lambda step, loss: None).state_dict()
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


def test_a_checkpoint_of_another_network_is_refused(scenes, tmp_path):
    checkpoint.write(tmp_path, {"model.x": torch.zeros(1)}, {"done": 1})
    with pytest.raises(Refused, match="checkpoint.safetensors: not the state of this training"):
        taught(training("segformer", scenes), tmp_path, lambda step, loss: None)


def test_warm_up_and_polynomial_decay():
    factors = [Course(steps=100).factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] and factors[99] < 0.02
    assert all(later < earlier for earlier, later in zip(factors[9:], factors[10:]))


class Maps(LabelledSource):
    """One image whose label map is given, of a run that is labelled from attention."""

    tasks = ("semantic", "open-vocabulary")

    def __init__(self, labels: np.ndarray, classes: tuple[str, ...]):
        super().__init__(len(labels), 1)
        self.labels, self.classes, self.thing_classes = labels.astype(np.uint8), classes, classes[1:]

    def load(self, record, seed):
        return Labelled("0", np.zeros((*self.labels.shape, 3), np.uint8), "", semantic=self.labels)


def test_things_and_a_background_are_what_both_sides_name(scenes):
    labels = np.full((SIDE, SIDE), 2)
    labels[0], labels[1], labels[2] = 0, IGNORE, 1
    generated = Maps(labels, ("background", "giraffe", "ball"))
    vocabulary = shared_vocabulary(scenes, generated)
    assert vocabulary.classes == ("background", *scenes.thing_classes)
    own = Examples(generated, vocabulary, "semantic", is_generated=True)[0].semantic
    assert (own[0] == 0).all() and (own[1] == IGNORE).all() and (own[2] == IGNORE).all()
    assert (own[3:] == vocabulary.classes.index("ball")).all()
    real, before = Examples(scenes, vocabulary, "semantic")[0].semantic, scenes[0].semantic
    for number, name in enumerate(scenes.classes):
        wanted = vocabulary.classes.index(name) if name in scenes.thing_classes else 0
        assert (real[before == number] == wanted).all(), name
    assert shared_vocabulary(scenes, scenes).classes == scenes.classes


def test_a_view_ignores_what_lies_outside_and_pixels_that_were_ignored():
    labels = np.full((SIDE, SIDE), 1)
    labels[:, : SIDE // 2] = IGNORE
    source = Maps(labels, ("background", "ball"))
    some = Examples(source, shared_vocabulary(source), "semantic")
    views = [some.view(0, (0.5, 0.5), np.random.default_rng(k)).semantic for k in range(8)]
    assert all((view == 1).sum() == SIDE * SIDE // 8 and (view == IGNORE).mean() == 7 / 8 for view in views)
    assert len({view.tobytes() for view in views}) > 4


def test_ignored_pixels_cost_nothing_and_stay_ignored(scenes, tmp_path):
    network, vocabulary = open_network("segformer"), student_data.vocabulary_of(scenes)
    model = build(network, vocabulary, "tiny", SIDE, 0).eval()
    images = torch.zeros(1, 3, SIDE, SIDE)
    labels = np.full((SIDE, SIDE), IGNORE, np.uint8)
    assert network.loss(model, images, [Labelled("0", labels, "", semantic=labels)], vocabulary).item() == 0
    labels[:8] = 3
    item = Labelled("0", np.zeros((SIDE, SIDE, 3), np.uint8), "", semantic=labels)
    other = Examples(scenes, vocabulary, "semantic")
    parts = (network, vocabulary, {"run": other}, other, Course(steps=1), tmp_path, "tiny")
    student = arms._Student(arms.Experiment("segformer", *parts), "synthetic", 0, [other], lambda *told: None)
    student._model = model
    again = student.relabelled(other)._again(item).semantic
    assert (again[8:] == IGNORE).all() and (again[:8] != IGNORE).all()


def test_the_mean_over_scales_is_that_of_each_scale_and_its_mirror(scenes):
    network, vocabulary = open_network("segformer"), student_data.vocabulary_of(scenes)
    model, items = build(network, vocabulary, "tiny", SIDE, 0).eval(), [scenes[0]]
    turned = [Labelled("0", scenes[0].image[:, ::-1], "")]
    first = answering.answered(network, model, items, vocabulary, True)[0]
    second = answering.answered(network, model, turned, vocabulary, True)[0]
    assert isinstance(first, SemanticMap) and first.labels.shape == (SIDE, SIDE)
    assert np.allclose(first.confidence, second.confidence[:, ::-1], atol=1e-4), "both see the same views"


def test_maps_are_scored_at_the_size_of_the_images(tmp_path):
    """A wide image is seen whole: what stands at its border, beyond the square in its middle, counts."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    wide, labels = np.zeros((70, 200, 3), np.uint8), np.zeros((70, 200), np.uint8)
    labels[:, 150:], labels[:, :20] = 1, IGNORE
    Image.fromarray(wide).save(tmp_path / "images/a.png")
    Image.fromarray(labels).save(tmp_path / "masks/a.png")
    (tmp_path / "classes.txt").write_text("background\nball\n")
    source = open_data(f"folder:{tmp_path}", SIDE, tasks=("semantic",))
    vocabulary = student_data.vocabulary_of(source)
    exam, shown = Examples(source, vocabulary, "semantic"), []

    def predict(model, images):
        """The right half is a ball, for a network that sees the whole image in another size."""
        shown.append(images.shape[-2:])
        right = torch.arange(images.shape[-1]) >= images.shape[-1] / 2
        return torch.stack([~right, right]).float()[None, :, None].expand(len(images), -1, images.shape[-2], -1)

    network, model = replace(open_network("segformer"), predict=predict), torch.nn.Linear(1, 1)
    found = answering.scored(network, model, exam, vocabulary, 2)
    assert shown == [(64, 192)] and exam[0].semantic.shape == (SIDE, SIDE)
    assert found["per_class"]["ball"] == 50 / 100 and found["per_class"]["background"] == 80 / 130


LINE = ["--data", "demo:2@900000", "--learn-from", "demo:4@1000", "--real", "4", "--steps", "2", "--batch-size", "2"]
LINE += ["--student-size", "tiny", "--repeats", "2", "--threads", "1", "--quiet"]


@long_test
def test_arms_are_compared_and_found_again(run, tmp_path, capsys, monkeypatch):
    line = [*LINE, "--student", "segformer", "--run", str(run), "--out", str(tmp_path / "out"), "--self-train"]
    assert command.main(line) == 0
    shown = capsys.readouterr().out
    assert "both over real: " in shown and "both-self over both: " in shown and "at 64 x 64 pixels" in shown
    head, row = shown.splitlines()[1:3]
    assert len(head) == len(row) and head.index("miou") + 4 == row.index(".") + 4, "columns lie below their heads"
    weights = {path: path.read_bytes() for path in (tmp_path / "out").rglob("model.safetensors")}
    assert sorted(path.parent.name for path in weights) == [
        f"{arm}-{seed}" for arm in ("both", "both-self", "real") for seed in (0, 1)
    ]
    monkeypatch.setattr(course.NetworkTraining, "step", None)  # nothing is taught again
    (left := tmp_path / "out" / "real-1" / "checkpoint.safetensors").write_bytes(b"as a kill after the last step")
    assert command.main([*line, "--real", "0", "--json"]) == 0  # all of them
    row = json.loads(capsys.readouterr().out)["student"]["semantic"]
    assert not left.exists()
    assert set(row["arms"]) == {"real", "both", "both-self"} and row["images"] == {"real": 4, "run": 4, "judged": 2}
    for arm in row["arms"].values():
        assert len(arm["seeds"]) == 2 and arm["interval"][0] <= arm["value"] <= arm["interval"][1]
        assert 0 <= arm["things"]["value"] <= 1
    assert command.main([*line, "--steps", "3"]) == 2 and "other settings (steps)" in capsys.readouterr().err
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out" / "real-0")
    assert command.main(line) == 0
    assert all(path.read_bytes() == content for path, content in weights.items()), "the same line, the same bytes"
    assert command.main([*line, "--tta"]) == 0  # labels of other answers teach another student
    assert all(path.read_bytes() == content for path, content in weights.items())
    for seed in (0, 1):
        other, plain = (tmp_path / "out" / f"both-self{end}-{seed}" / "model.safetensors" for end in ("-tta", ""))
        assert other.read_bytes() != plain.read_bytes()


@long_test
def test_labels_that_changed_under_the_same_names_are_noticed(run, tmp_path, capsys):
    for name in ("learnt", "judged"):
        LAYOUTS["folder"][1](tmp_path / name)
    parts = dict(zip(LINE[::2], LINE[1::2])) | {"--real": "2", "--run": str(run), "--out": str(tmp_path / "out")}
    parts |= {"--data": f"folder:{tmp_path}/judged", "--learn-from": f"folder:{tmp_path}/learnt"}
    line = [*(word for pair in parts.items() for word in pair), "--student", "segformer", "--quiet", "--json"]

    def turned(path: Path) -> None:
        Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path)

    assert command.main(line) == 0
    before = json.loads(capsys.readouterr().out)["student"]["semantic"]["arms"]["real"]["seeds"]
    turned(tmp_path / "judged/masks/scene 0.png")
    assert command.main(line) == 0
    after = json.loads(capsys.readouterr().out)["student"]["semantic"]["arms"]["real"]["seeds"]
    assert before != after, "the students are asked again"
    turned(tmp_path / "learnt/masks/scene 2.png")  # of which no student learnt
    assert command.main(line) == 0
    turned(tmp_path / "learnt/masks/scene 0.png")
    (tmp_path / "learnt/masks/scene 1.png").write_bytes(b"")
    assert command.main([*line, "--out", str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()
    Image.new("L", (96, 80)).save(tmp_path / "learnt/masks/scene 1.png")
    capsys.readouterr()
    assert command.main(line) == 2
    said = "its students were trained with other settings (pictures or labels of the real images)"
    assert said in capsys.readouterr().err
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    del settings[arms.CONTENTS]  # as in a folder of an earlier version
    (tmp_path / "out/settings.json").write_text(json.dumps(settings))
    assert command.main(line) == 0


def test_other_labels_of_the_same_samples_of_a_run_are_other_ones_to_learn_from(run, tmp_path):
    """Those of every sample as it is stored, and those that a reviewer corrects; none changes a name or run.json."""
    place = tmp_path / "run"
    shutil.copytree(run, place)

    def digest(split: str) -> str:
        source = open_data(f"run:{place}{split}", SIDE, tasks=("semantic",))
        return arms.digest_of(Examples(source, student_data.vocabulary_of(source), "semantic", is_generated=True))

    (place / "review").mkdir()
    found = [digest(""), digest("[all]")]
    for corners in ([0, 0, 8, 8], [0, 0, 9, 9]):
        corrections = {f"{k:08d}": {"ignored": [corners]} for k in range(4)}
        (place / "review" / "corrections.json").write_text(json.dumps(corrections))
        found.append(digest("[corrected]"))
    assert len({*found}) == 4 and digest("") == found[0] and digest("[all]") == found[1]


@long_test
def test_a_student_begins_with_the_weights_of_a_folder(run, tmp_path, capsys):
    line = [*(word for word in LINE if word not in ("--student-size", "tiny")), "--run", str(run), "--only-synthetic"]
    vocabulary = student_data.vocabulary_of(open_data("demo:1@1", SIDE))
    network = open_network("segformer")
    model = build(network, vocabulary, "tiny", SIDE, 5)
    folder = tmp_path / "weights"
    model.save_pretrained(folder)
    other = build(network, student_data.Vocabulary(("a", "b"), (), (), 0.0), "", SIDE, 0, str(folder))
    assert other.config.id2label == {0: "a", 1: "b"} and other.config.label2id == {"a": 0, "b": 1}
    begun = other.state_dict()
    stored = model.state_dict()
    for name, value in begun.items():
        assert torch.equal(value, stored[name]) or "classifier" in name, name
    assert begun["decode_head.classifier.weight"].shape[0] == 2
    given = ["--student", "segformer", "--weights", str(folder), "--out", str(tmp_path / "out")]
    assert command.main([*line, *given]) == 0
    assert (tmp_path / "out" / "synthetic-0" / "config.json").exists()
    capsys.readouterr()

    def refused(name: str, said: str) -> None:
        words = ["--student", name, "--weights", str(folder), "--out", str(tmp_path / "none")]
        assert command.main([*line, *words]) == 3
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error and not (tmp_path / "none").exists(), error

    refused("glpn", "its config.json is of 'segformer', expected 'glpn'")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "block" not in name}, folder / "model.safetensors")
    refused("segformer", "backbone tensors are missing or differ in size")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-9])
    refused("segformer", "truncated")
    (folder / "model.safetensors").unlink()
    refused("segformer", "no model.safetensors")
    (folder / "config.json").write_text("[]")
    refused("segformer", "expected an object")
    shutil.rmtree(folder)
    refused("segformer", "config.json")


@pytest.mark.parametrize("name", ["segformer", "deeplabv3plus", "mask2former", "vitpose"])
def test_the_head_of_as_many_other_classes_starts_anew(name, tmp_path):
    network = open_network(name)
    words = ("background", "a", "b"), ("background", "cat", "dog")
    first, second = (student_data.Vocabulary(some, some[1:], some[1:], 0.0) for some in words)
    made = build(network, first, "tiny", SIDE, 5)
    made.save_pretrained(tmp_path)
    begun = {which: build(network, which, "", SIDE, 0, str(tmp_path)).state_dict() for which in (first, second)}
    stored = made.state_dict()
    changed = {key for key, value in stored.items() if not torch.equal(begun[second][key], value)}
    assert all(torch.equal(begun[first][key], value) for key, value in stored.items())
    assert changed and not any(key.startswith(network.body) for key in changed), changed


@pytest.mark.parametrize(
    "more, said",
    [
        (["--student", "segfromer"], "did you mean segformer"),
        (["--student", "segformer", "--student-size", "b00"], "did you mean b0"),
        (["--student", "segformer", "--task", "depth"], "--task depth: segformer learns semantic"),
        (["--student", "small", "--tta"], "--tta: for students of transformers"),
        (["--student", "small"], "--out: for students of transformers"),
        (["--student", "mask2former", "--tta"], "the predictions of mask2former cannot be averaged"),
        (["--student", "glpn", "--self-train"], "--self-train: glpn learns depth"),
        (["--student", "segformer", "--only-synthetic", "--both"], "--only-synthetic and --both cannot be combined"),
        (["--student", "segformer", "--size", "100"], "--size: 100 is not a multiple of 32"),
        (["--student", "segformer", "--batch-size", "1"], "--batch-size: 1 is not at least 2"),
        (["--student", "segformer", "--real", "9"], "--real 9: "),
        (["--student", "segformer", "--real", "0", "--learn-from", ""], "demo:0@1000: expected demo:COUNT@FIRST_SEED"),
    ],
)
def test_what_cannot_be_taught_is_refused(run, tmp_path, capsys, more, said):
    from datasetdm_fast.command_line.ending import run_command

    line = [*(word for word in LINE if word not in ("--student-size", "tiny")), "--run", str(run)]
    code = run_command(command.main, [*line, "--out", str(tmp_path / "none"), *more])
    error = capsys.readouterr().err
    assert code == 2 and said in error and "Traceback" not in error and not (tmp_path / "none").exists(), error


def test_the_built_in_student_says_what_of_a_run_it_cannot_learn(tmp_path, capsys):
    path = tmp_path / "run"
    samples = [replace(rendered(k, SIDE), request=Request(k, "a photo", k)) for k in range(2)]
    with RunFolder(path, document(2, SIDE)) as folder:
        folder.add(samples, {})
        finish_run(folder)
    line = ["--student", "small", "--data", "demo:2", "--real", "2", "--steps", "1", "--repeats", "2", "--run"]
    assert command.main([*line, str(path)]) == 0
    assert "instance is left out: no prompt names a class of the data" in capsys.readouterr().err
    assert command.main([*line, str(path), "--task", "instance"]) == 2
    assert "none of its 2 images teaches instance, as no prompt names a class of the data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "student, task", [("small", "semantic"), ("segformer", "semantic"), ("mask2former", "instance")]
)
def test_a_run_none_of_whose_classes_the_data_names_is_refused(run, tmp_path, capsys, student, task):
    kind = "yolo-seg"  # whose classes the data names by itself
    for name in ("learnt", "judged"):
        LAYOUTS[kind][1](tmp_path / name)
        path = tmp_path / name / "data.yaml"
        path.write_text("names: [" + ", ".join(f"other{k}" for k in range(9)) + "]\n")
    parts = dict(zip(LINE[::2], LINE[1::2])) | {"--real": "2", "--run": str(run), "--out": str(tmp_path / "out")}
    parts |= {"--data": f"{kind}:{tmp_path}/judged", "--learn-from": f"{kind}:{tmp_path}/learnt"}
    parts |= {"--student": student, "--task": task}
    for flag in ("--student-size", "--out") if student == "small" else ():
        del parts[flag]
    assert command.main([*(word for pair in parts.items() for word in pair), "--quiet"]) == 2
    said = (
        "none of its 4 images teaches semantic, as no image shows" if student == "small" else "are none of the data's, "
    )
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("student", ["small", "segformer"])
def test_data_sets_of_other_classes_are_refused_and_one_is_named(run, tmp_path, capsys, student):
    for name in ("learnt", "judged"):
        LAYOUTS["yolo-seg"][1](tmp_path / name)
        classes = [f"other{k}" for k in range(9 if name == "learnt" else 8)]
        (tmp_path / name / "data.yaml").write_text(f"names: [{', '.join(classes)}]\n")
    line = ["--run", str(run), "--real", "2", "--student", student, "--quiet"]
    line += ["--data", f"yolo-seg:{tmp_path}/judged", "--learn-from", f"yolo-seg:{tmp_path}/learnt"]
    assert command.main([*line, *(["--out", str(tmp_path / "out")] if student == "segformer" else ())]) == 2
    error = capsys.readouterr().err
    assert "have different classes: only --learn-from has other8" in error and "the same classes.txt" in error
    with pytest.raises(Refused, match="different classes: the same ones in another order"):
        check_classes(("ball", "cube"), ("cube", "ball"))


def test_a_run_without_the_task_is_refused(run, tmp_path, capsys):
    poor = tmp_path / "poor"
    shutil.copytree(run, poor)
    document = json.loads((poor / "run.json").read_text())
    document["config"]["task"] = ["semantic"]
    (poor / "run.json").write_text(json.dumps(document))
    line = [*LINE, "--student", "glpn", "--run", str(poor), "--out", str(tmp_path / "none")]
    assert command.main(line) == 2
    error = capsys.readouterr().err
    assert f"--run {poor}: no ground truth for depth" in error and not (tmp_path / "none").exists()


@pytest.mark.parametrize("student, folder", [("glpn", "depth"), ("segformer", "masks"), ("small", "masks")])
def test_images_that_cannot_be_judged_or_learnt_from_are_refused(run, tmp_path, capsys, student, folder):
    """All of whose truth is ignored, or none of which can be read."""
    for name in ("good", "ignored", "bad"):
        LAYOUTS["folder"][1](tmp_path / name)
    for path in (tmp_path / "ignored" / folder).iterdir():
        values = np.asarray(Image.open(path))
        Image.fromarray(np.full_like(values, 0 if folder == "depth" else IGNORE)).save(path)
    for path in (tmp_path / "bad" / folder).iterdir():
        path.write_bytes(b"")
    parts = dict(zip(LINE[::2], LINE[1::2])) | {"--real": "0", "--run": str(run), "--out": str(tmp_path / "out")}
    parts |= {"--steps": "1", "--task": "depth" if folder == "depth" else "semantic", "--student": student}
    for flag in ("--student-size", "--out") if student == "small" else ():
        del parts[flag]
    for data, learnt, said in (
        ("ignored", "good", "no image has the ground truth to compare with"),
        ("bad", "good", "none of 3 images can be read; "),
        ("good", "bad", "none of 3 images can be read; "),
    ):
        parts |= {"--data": f"folder:{tmp_path / data}", "--learn-from": f"folder:{tmp_path / learnt}"}
        assert command.main([*(word for pair in parts.items() for word in pair), "--quiet", "--skip-bad"]) == 2
        assert said in capsys.readouterr().err
        assert data != "ignored" or not (tmp_path / "out").exists()  # before a student is trained for nothing


@pytest.mark.parametrize("student, real", [("small", "0"), ("segformer", "2")])
def test_real_images_that_also_judge_are_counted(run, tmp_path, capsys, student, real):
    for name in ("one", "two"):
        LAYOUTS["folder"][1](tmp_path / name)
    parts = dict(zip(LINE[::2], LINE[1::2])) | {"--real": real, "--run": str(run), "--out": str(tmp_path / "out")}
    parts |= {"--data": f"folder:{tmp_path / 'one'}", "--learn-from": f"folder:{tmp_path / 'two'}"}
    parts |= {"--steps": "1", "--task": "semantic", "--student": student}
    for flag in ("--student-size", "--out") if student == "small" else ():
        del parts[flag]
    line = [word for pair in parts.items() for word in pair]
    assert command.main([*line, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seen_in_training"] == (3 if real == "0" else 2)


def test_no_library_is_imported_before_a_student_is_chosen():
    import subprocess
    import sys

    code = (
        "import sys, datasetdm_fast.training.evaluation.settings as s; "
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert STUDENTS == ("small", *NETWORKS)
