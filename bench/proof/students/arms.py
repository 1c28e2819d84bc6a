"""Student networks taught by real images, by those of a run or by both, compared over seeds; resumed from their folder.

OUT/settings.json                          what decides the weights
OUT/ARM-SEED/checkpoint.safetensors        the state of a training that was not finished
OUT/ARM-SEED/config.json, model.safetensors  a finished student, as transformers and --weights open it
OUT/ARM-SEED/figures.json                  what it scores, and on which images
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from bench.proof.students.answering import answered, is_map, scored
from bench.proof.students.course import Course, NetworkTraining, taught
from bench.proof.students.examples import Examples
from bench.proof.students.networks.network import StudentNetwork
from bench.proof.students.networks.weights import build, check_folder
from bench.proof.students.student_data import IGNORED, Vocabulary, digest_of_items
from bench.proof.students.worth import FIGURES, compared, t95, verdict
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.pictures.labelled import Labelled
from datasetdm_fast.errors import Refused
from datasetdm_fast.training import checkpoint
from datasetdm_fast.untrusted import documents

TAUGHT_BY = "taught by"  # heads the arms of a table
ARMS = {"real": ("real",), "synthetic": ("run",), "both": ("real", "run")}  # name -> the sets it is taught by
SELF = "-self"  # what the names of students end with that are taught again by labels of their own
AVERAGED = "-tta"  # what their folders end with where these labels are means over scales and mirror images
LARGEST_STATE = 2**24  # bytes of a JSON file in the folder
LARGEST_WEIGHTS = 2**34  # bytes
OTHER = "Choose another --out, or the settings that it was started with."
CONTENTS = "pictures or labels of the real images"


@dataclass(frozen=True)
class Experiment:
    """Which students are taught by what, and what they are asked."""

    name: str
    network: StudentNetwork
    vocabulary: Vocabulary
    sets: Mapping[str, Examples]  # real, run
    exam: Examples
    course: Course
    folder: Path
    size: str
    weights: str = ""
    seeds: int = 3
    is_averaged: bool = False  # whether an answer is the mean over scales and mirror images
    trains_itself: bool = False
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def side(self) -> int:
        return self.exam.source.size

    def built(self, seed: int) -> nn.Module:
        """A student that was taught nothing yet."""
        return build(self.network, self.vocabulary, self.size, self.side, seed, self.weights)

    def settings(self) -> dict[str, Any]:
        """What decides the weights of its students."""
        files = check_folder(self.network, Path(self.weights))[1] if self.weights else []
        taught_by = {name: digest_of(some) for name, some in self.sets.items()}
        return {
            "student": self.name,
            "size": self.size,
            "weights": [storage.sha256_of(path) for path in files],
            "pixels": self.side,
            "classes": list(self.vocabulary.classes),
            "precision": str(self.dtype).removeprefix("torch."),
            **asdict(self.course),
            **taught_by,
            **({CONTENTS: digest_of_contents(self.sets["real"])} if "real" in self.sets else {}),
        }

    @cached_property
    def exam_digests(self) -> dict[str, str]:
        """Of the images that its students are asked about."""
        return {"images": digest_of(self.exam), "contents": digest_of_contents(self.exam, is_map(self.network))}


def digest_of(some: Examples) -> str:
    """SHA-256 of which images and labels a set holds."""
    digest = hashlib.sha256(f"{type(some.source).__name__} {some.source.framing} {some.source.classes}".encode())
    if (run := getattr(some.source, "run", None)) is not None:
        digest.update(f"{some.source.map}{json.dumps(run.document, sort_keys=True, default=str)}".encode())
        if some.source.is_all:  # whose doubtful pixels count, and whose labels a reviewer may have corrected
            digest.update(f"all {some.source.is_corrected} {sorted(some.source.corrections.items())}".encode())
    for index in range(len(some)):
        digest.update(f"{some.source.name(some.source.order[index])}\0".encode())
    return digest.hexdigest()


def digest_of_contents(some: Examples, is_whole: bool = False) -> str:
    """SHA-256 of the pictures and labels of a set, empty where its address or a run's settings alone decide them."""
    if some.source.is_rendered or hasattr(some.source, "run"):
        return ""
    return digest_of_items(some.whole(index) if is_whole else some[index] for index in range(len(some)))


def compare(
    experiment: Experiment,
    arms: Sequence[str],
    on_message: Callable[[str], None] = lambda line: None,
    on_step: Callable[[str, int, float], None] = lambda name, step, loss: None,
) -> dict[str, Any]:
    """{task: figures} of the students of every arm and seed; the same call again goes on where it was stopped."""
    out = experiment.folder
    if experiment.weights:  # what does not fit is refused before anything is written
        experiment.built(0)
    settings = experiment.settings()  # reads the real images, of which one may be bad
    storage.make_folder(out)
    with storage.hold_lock(out / ".lock"):
        storage.remove_temporaries(out)
        _check_settings(out, settings)
        scores: dict[str, list[dict[str, Any]]] = {}
        for seed in range(experiment.seeds):
            for arm in arms:
                sets = [experiment.sets[name] for name in ARMS[arm]]
                first = _Student(experiment, arm, seed, sets, on_step)
                scores.setdefault(arm, []).append(first.figures(on_message))
                if experiment.trains_itself and "run" in ARMS[arm]:
                    again = [first.relabelled(some) if name == "run" else some for name, some in zip(ARMS[arm], sets)]
                    name = arm + SELF + (AVERAGED if experiment.is_averaged else "")
                    second = _Student(experiment, name, seed, again, on_step)
                    scores.setdefault(arm + SELF, []).append(second.figures(on_message))
        found = _found(experiment, scores)
        storage.publish({out / "result.json": (json.dumps(found, indent=2) + "\n").encode()})
    return found


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    path = out / "settings.json"
    if storage.is_there(path):
        before = _read(path)
        before.setdefault(CONTENTS, settings.get(CONTENTS))  # which earlier versions did not note
        if differing := sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name)):
            raise Refused(f"--out {out}: its students were trained with other settings ({', '.join(differing)})", OTHER)
    elif any(path.name != ".lock" for path in out.iterdir()):
        raise Refused(f"--out {out}: the folder holds something else", "Choose another --out.")
    else:
        storage.publish({path: (json.dumps(settings, indent=2) + "\n").encode()})


def _read(path: Path) -> dict[str, Any]:
    try:
        found = documents.parse_json(storage.read(path, LARGEST_STATE), str(path))
        documents.check_form(found, {}, path.name)
    except ValueError as error:
        raise Refused(f"{path}: {documents.reason_of(error)}", "Delete it, or choose another --out.") from error
    return found


class _Student:
    """One student in its folder: taught, or found finished."""

    def __init__(
        self,
        experiment: Experiment,
        arm: str,
        seed: int,
        sets: Sequence[Examples],
        on_step: Callable[[str, int, float], None],
    ):
        self.experiment, self.seed, self.sets = experiment, seed, sets
        self.name, self.folder = f"{arm}-{seed}", experiment.folder / f"{arm}-{seed}"
        self.on_step = on_step
        self._model: nn.Module | None = None

    def figures(self, on_message: Callable[[str], None]) -> dict[str, Any]:
        """What it scores, read where it was scored on the same images before."""
        e, path = self.experiment, self.folder / "figures.json"
        if storage.is_there(self.folder / "model.safetensors"):
            checkpoint.remove(self.folder)  # of a student that was killed when it was finished
        exam = {**e.exam_digests, "averaged": e.is_averaged, "own_size": is_map(e.network)}
        before = _read(path) if storage.is_there(path) else {}
        if before.get("exam") != exam or not storage.is_there(self.folder / "model.safetensors"):
            found = scored(e.network, self.model(), e.exam, e.vocabulary, e.course.batch_size, e.is_averaged)
            before = {"exam": exam, "figures": found}
            storage.publish({path: (json.dumps(before, indent=2) + "\n").encode()})
        name = FIGURES[e.network.task]
        things = before["figures"].get("miou_of_things")
        more = "" if things is None else f", of things {things:.3f}"
        on_message(f"{self.name}: {e.network.task} {name} {before['figures'][name]:.3f}{more}")
        return before["figures"]

    def model(self) -> nn.Module:
        """The student's network, ready to answer."""
        if self._model is None:
            self._model = self._opened() if storage.is_there(self.folder / "model.safetensors") else self._taught()
        return self._model

    def _opened(self) -> nn.Module:
        path, model = self.folder / "model.safetensors", self.experiment.built(self.seed)
        try:
            model.load_state_dict(load(storage.read(path, LARGEST_WEIGHTS)))
        except (ValueError, RuntimeError, KeyError) as error:
            raise Refused(f"{path}: not the weights of {self.name}", "Delete its folder to teach it again.") from error
        return model.to(self.experiment.device).eval().requires_grad_(False)

    def _taught(self) -> nn.Module:
        e = self.experiment
        parts = (e.vocabulary, self.sets, e.course, self.seed, e.device, e.dtype)
        training = NetworkTraining(e.network, e.built(self.seed), *parts)
        done = taught(training, self.folder, lambda step, loss: self.on_step(self.name, step, loss))
        weights = {name: value.detach().cpu().clone() for name, value in done.state_dict().items()}
        files = {"config.json": done.config.to_json_string(use_diff=False).encode(), "model.safetensors": save(weights)}
        storage.publish({self.folder / name: content for name, content in files.items()})
        checkpoint.remove(self.folder)
        return done

    def relabelled(self, some: Examples) -> Examples:
        """The same images with this student's labels, where theirs were not ignored."""
        e = self.experiment

        def again(item: Labelled) -> Labelled:
            found = answered(e.network, self.model(), [item], e.vocabulary, e.is_averaged)[0].labels.copy()
            found[item.semantic == IGNORED] = IGNORED
            return replace(item, semantic=found)

        return some.relabelled(again)


def _found(experiment: Experiment, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    task = experiment.network.task
    figure = FIGURES[task]
    values = {arm: [row[figure] for row in rows] for arm, rows in scores.items()}
    arms = {arm: _mean(each) for arm, each in values.items()}
    for arm, rows in scores.items():
        if all("miou_of_things" in row for row in rows):
            arms[arm]["things"] = _mean([row["miou_of_things"] for row in rows])
    pairs = [("real", "both"), *((arm, arm + SELF) for arm in ARMS)]
    gains = [
        {"of": after, "over": before} | {name: row[name] for name in ("gain", "interval", "helps")}
        for before, after in pairs
        if before in values and after in values
        for row in [compared(task, values[before], values[after])]
    ]
    images = {name: len(some) for name, some in experiment.sets.items()} | {"judged": len(experiment.exam)}
    facts = {"student": f"{experiment.name} {experiment.size}".strip(), "pixels": experiment.side, "images": images}
    facts |= {
        "own_size": is_map(experiment.network),
        "steps": experiment.course.steps,
        "averaged": experiment.is_averaged,
        "figure": figure,
    }
    return {task: facts | {"arms": arms, "gains": gains}}


def _mean(values: Sequence[float]) -> dict[str, Any]:
    """Mean over the seeds with its 95 % interval."""
    mean = statistics.fmean(values)
    half = t95(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"value": mean, "interval": [mean - half, mean + half], "seeds": list(values)}


def table(found: Mapping[str, Any]) -> str:
    """The figures for a reader."""
    ((task, row),) = found.items()
    wide = max(map(len, (TAUGHT_BY, *row["arms"])))
    averaged = ", the mean over six scales and their mirror images" if row["averaged"] else ""
    own = ", scored at the images' own size" if row["own_size"] else ""
    lines = [f"{row['student']}, {task}, at {row['pixels']} x {row['pixels']} pixels{own}{averaged}"]
    has_things = any("things" in arm for arm in row["arms"].values())
    lines.append(f"{TAUGHT_BY:{wide}}  {row['figure']:>8}  95 % interval" + "     of things" * has_things)
    for name, arm in row["arms"].items():
        low, high = arm["interval"]
        things = f"  {arm['things']['value']:9.3f}" if "things" in arm else ""
        lines.append(f"{name:{wide}}  {arm['value']:8.3f}  {low:6.3f} to {high:6.3f}{things}")
    for gain in row["gains"]:
        low, high = gain["interval"]
        difference = f"{gain['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(f"{gain['of']} over {gain['over']}: {difference}: {verdict(gain)}")
    images = row["images"]
    counts = [f"{images[name]} {said}" for name, said in (("real", "real"), ("run", "generated")) if name in images]
    seeds = len(next(iter(row["arms"].values()))["seeds"])
    lines.append(
        f"{' and '.join(counts)} images, {seeds} students of each kind, {row['steps']} steps, {images['judged']} "
        "unseen images"
    )
    return "\n".join(lines)
