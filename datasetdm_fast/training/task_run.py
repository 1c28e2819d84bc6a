"""One decoder's training in its folder: started, resumed or found finished, ending in weights, figures and a page.

FOLDER/config.json, model.safetensors   the decoder, once it is done
FOLDER/training/settings.json           what decides its weights
FOLDER/training/data.json               digests of the pictures and labels
FOLDER/training/checkpoint.safetensors  the whole state, replaced from time to time
FOLDER/training/log.jsonl               losses and held-out figures
FOLDER/training/result.json, page.html  figures, and answers beside the truth
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.data import Annotation
from datasetdm_fast.disk import locks, storage
from datasetdm_fast.engine.decoders.checkpoint import Decoder, load_decoder, round_parameters, save_decoder
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.engines.device import multiplies_bf16
from datasetdm_fast.engine.engines.memory import keep_freed
from datasetdm_fast.engine.loading import checkpoint
from datasetdm_fast.errors import Refused
from datasetdm_fast.training import data_record, held_out, outlines, page, word_heads
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.evaluation.intervals import intervals
from datasetdm_fast.training.evaluation.meter import Meter
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.log import Log, log_lines
from datasetdm_fast.training.loop import Trainer
from datasetdm_fast.training.processes import SOLO, Ranks
from datasetdm_fast.training.readers import folders_of
from datasetdm_fast.training.schedule import TrainingSchedule
from datasetdm_fast.training.settings import TrainConfig
from datasetdm_fast.training.word_heads import WordHeads
from datasetdm_fast.untrusted.documents import check_form, one_line

LOCK, PAGE = ".lock", "page.html"
LARGEST_STATE = 2**24  # bytes of a JSON file of a training
COUNTED = {"images", "held_out_images", "left_out", "steps"}  # settings that may follow from how many images there are
RESULT = {"steps": int, "images": int, "held_out_images": int, "held_out": dict}  # what results of all versions have


@dataclass(frozen=True)
class TaskPlan:
    decoder: DecoderConfig
    schedule: TrainingSchedule
    words: Tensor | None  # class embeddings
    settings: Mapping[str, Any]  # everything that decides the weights, as JSON, apart from:
    data: Mapping[str, Any]  # the digests of the data's items
    taught_anew: Callable[[], str]  # a picture of which earlier versions taught something else, empty if none


@dataclass(frozen=True)
class TaskTraining:
    folder: Path
    plan: TaskPlan
    lessons: TrainingViews
    held: TrainingViews | None
    config: TrainConfig
    framing: Mapping[str, Any]  # how pictures are brought to the model's size
    device: torch.device
    tokenizer: Callable[..., object]
    command: str = ""  # what the user typed
    folds: Mapping[str, Any] | None = None  # figures of cross-validation
    of_fold: tuple[TrainingViews, Path] | None = None  # what the page shows where no image is held out, and the decoder

    @property
    def task(self) -> str:
        return self.plan.decoder.task

    @property
    def state(self) -> Path:
        return self.folder / "training"

    @property
    def shown(self) -> str:
        """Which images the page shows."""
        if self.held:
            return "Held-out images"
        return "Images that the decoder of the first fold has not seen" if self.of_fold else ""

    @property
    def dtype(self) -> str:
        if self.config.dtype != "auto":
            return self.config.dtype
        return "bf16" if self.device.type == "cuda" and multiplies_bf16(self.device) else "fp32"


def finished(folder: Path, plan: TaskPlan) -> dict | None:
    """The result of a training that ended here, None where there is work left, as where its weights are gone; other
    settings or data are refused, and versions that taught something else.
    """
    path, settings = folder / "training" / "settings.json", _flat(plan.settings)
    if not storage.is_there(path):
        if (folder / "config.json").exists():
            raise Refused(f"--out: {folder} holds a decoder that was not trained there", "Choose another --out.")
        return None
    before, data = _flat(read_state(path, {})), folder / "training" / data_record.NAME  # earlier versions wrote none
    recorded = read_state(data, data_record.FORM, data_record.LARGEST_RECORD) if data.exists() else {}
    differing = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if "model_digests" not in differing:  # then the model is the same, wherever it lies
        differing = [name for name in differing if name != "model"]
    now, places = plan.data, folders_of(str(before.get("data")), settings["data"])
    if "data" in differing and recorded.get("items") and places:
        differing.remove("data")  # what the images and labels are decides, not where they lie
        recorded, now = (data_record.below(one, place) for one, place in zip((recorded, now), places, strict=True))
    if recorded and COUNTED.issuperset(differing):
        data_record.check(folder, recorded, now)
    if differing:
        said = ", ".join(
            f"{name} {one_line(json.dumps(before.get(name)))} there, {one_line(json.dumps(settings.get(name)))} now"
            for name in differing[:4]
        )
        raise Refused(
            f"--out: {folder} was trained with other settings ({said})",
            "Choose another --out, or the settings that it was started with.",
        )
    files = folder / "training" / "result.json", folder / "config.json", folder / "model.safetensors"
    if all(file.exists() for file in files):
        return read_state(files[0], RESULT)
    data_record.check_version(folder, recorded, plan.taught_anew)
    return None


def clear(folder: Path) -> None:
    """Deletes the state that a training which ended here left where it was killed in its last moment."""
    checkpoint.remove(folder / "training")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with each of the decoder under a name of its own, so that a difference is told in few words."""
    own = settings.get("decoder")
    inner = {f"decoder {name}": value for name, value in own.items()} if isinstance(own, dict) else {}
    return {name: value for name, value in settings.items() if name != "decoder" or not inner} | inner


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a training's folder, and takes away what killed ones left half-written."""
    storage.make_folder(folder / "training")
    with locks.locked(folder / "training" / LOCK):
        storage.remove_temporaries(folder)
        yield


def read_state(path: Path, form: Mapping[str, Any], most: int = LARGEST_STATE) -> dict:
    """A JSON file of a training, an object with the entries of a form."""
    try:
        found = json.loads(storage.read(path, most))
    except ValueError as error:
        raise Refused(f"{path}: not JSON ({error})", "Choose another --out, or restore it from a copy.") from None
    try:
        check_form(found, form)
    except ValueError as error:
        raise Refused(
            f"{path}: not a file of a training ({error})", "Choose another --out, or restore it from a copy."
        ) from None
    return found


def run(
    training: TaskTraining,
    ranks: Ranks = SOLO,
    on_step: Callable[[int, float, float | None], None] = lambda step, loss, figure: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> dict | None:
    """The result of the training, or None where it was stopped; the same call again then goes on, to the same bits."""
    plan = training.plan
    keep_freed()
    if ranks.is_first:
        data, settings = training.state / data_record.NAME, training.state / "settings.json"
        if not settings.exists():  # which come last: where they are there without the data, an earlier version began
            said = json.dumps(plan.settings, indent=2) + "\n"
            storage.publish({data: data_record.as_json(plan.data), settings: said.encode()})
    trainer = Trainer(
        *(plan.decoder, plan.schedule, training.lessons, plan.words, training.device, training.dtype, ranks),
        is_ahead=training.lessons.captures.is_stored,
    )
    try:
        started = _StartedTraining(training, trainer, ranks)
        with Log(training.state, trainer.done, is_writing=ranks.is_first) as log:
            if not started.train(log, on_step, is_stopping):
                return None
        return ranks.said(started.end() if ranks.is_first else None)
    finally:
        trainer.close()


class _StartedTraining:
    """A trainer between its first and last step, with the best it has been."""

    def __init__(self, training: TaskTraining, trainer: Trainer, ranks: Ranks):
        self.training, self.trainer, self.ranks = training, trainer, ranks
        self.best: dict[str, Tensor] = {}
        self.numbers: dict[str, Any] = {
            "figure": None,
            "step": 0,
            "worse": 0,
            "has_ended": False,
            "last": None,
            "looks": 0,
        }
        self.saved = time.monotonic()
        self.heads = WordHeads()
        if ranks.is_first and training.config.by_word == "auto":
            self.heads = word_heads.learnt(training.lessons, training.plan.decoder, training.tokenizer)
        if (found := checkpoint.read(training.state)) is None:
            return
        tensors, numbers = found
        with checkpoint.restoring(training.state):
            trainer.restore(tensors, numbers["trainer"])
        self.numbers |= numbers["journey"]
        self.best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}

    def train(self, log: Log, on_step: Callable, is_stopping: Callable[[], bool]) -> bool:
        """Takes the steps that are left; whether the last was taken."""
        training, trainer, steps = self.training, self.trainer, self.training.plan.schedule.steps
        checks = training.config.checks
        while trainer.done < steps and not self.numbers["has_ended"]:
            if self.ranks.any(is_stopping()):
                self.save()
                return False
            rate, loss = trainer.rate(trainer.done), trainer.step()
            step, figure = trainer.done, None
            self.numbers["last"] = loss
            log.step(step, steps, loss, rate)
            if training.held and step * checks // steps > (step - 1) * checks // steps:
                figure = self.look()
                if figure is not None:
                    log.figure(step, METRICS[training.task].held_out_figure, figure)
            on_step(step, loss, figure)
            if self.ranks.is_first and time.monotonic() - self.saved >= training.config.save_every:
                self.save()
        return True

    @property
    def _is_choosing(self) -> bool:
        """Whether the held-out images are enough to choose by: of a few, chance picks weights of far too early."""
        held = self.training.held
        return held is not None and held_out.are_enough(len(held.numbers))

    def look(self) -> float | None:
        """The held-out figure now, None where all truth of these images is ignored; the weights are kept where it is
        the best so far of enough images.
        """
        task, numbers, patience = self.training.task, self.numbers, self.training.config.patience
        decoder, figure = self._decoder(), None
        if self.ranks.is_first:
            figure = _judged(self.training, decoder)[1].result().get(METRICS[task].held_out_figure)
            numbers["looks"] += 1
        figure = self.ranks.said(figure)
        if figure is None or not self._is_choosing:
            return figure
        if held_out.is_better(task, figure, numbers["figure"]):
            self.best = {name: value.detach().cpu().clone() for name, value in decoder.state_dict().items()}
            numbers |= {"figure": figure, "step": self.trainer.done, "worse": 0}
        else:
            numbers["worse"] += 1
            numbers["has_ended"] = 0 < patience <= numbers["worse"]
        return figure

    def _decoder(self) -> Decoder:
        """The decoder as it would be stored now."""
        decoder = self.trainer.finished()
        decoder.config = self.heads.given_to(decoder.config)
        return decoder

    def save(self) -> None:
        if self.ranks.is_first:
            tensors, numbers = self.trainer.state()
            tensors |= {f"best.{name}": value for name, value in self.best.items()}
            checkpoint.write(self.training.state, tensors, {"trainer": numbers, "journey": self.numbers})
        self.saved = time.monotonic()

    def end(self) -> dict:
        """Writes the decoder, the best by enough held-out images or else the last, its figures and its page."""
        training, done, held = self.training, self.trainer.done, self.training.held
        self.save()
        decoder, is_chosen = self._decoder(), self._is_choosing and bool(self.best)
        if is_chosen:
            decoder.load_state_dict(self.best)
        round_parameters(decoder, training.config.storage)
        of_some = partial(_answers, training, training.lessons, decoder)
        decoder.config = outlines.chosen(training.config, decoder.config, training.lessons, of_some)
        save_decoder(decoder, training.folder, storage=training.config.storage)
        found, meter = _judged(training, decoder) if held else ([], None)
        figures = meter.result() if meter else {}
        source, numbers = training.lessons.source, training.lessons.numbers
        classes = held_out.classes_shown(training.lessons) if meter and meter.columns else 0
        result = {
            "task": training.task,
            "images": len(training.lessons.numbers),
            "framing": dict(training.framing),
            "held_out_images": len(held.numbers) if held else 0,
            "unrelated_images": held_out.unrelated(source, [*numbers, *(held.numbers if held else ())]),
            "steps": done,
            "stopped_early": done < training.plan.schedule.steps,
            "weights_of_step": self.numbers["step"] if is_chosen else done,
            "loss": self.numbers["last"],
            "outlines": decoder.config.outlines,
            "words": {"masks": self.heads.masks, "named_rightly": self.heads.right, "read": bool(self.heads.shares)},
            "held_out": figures,
            "held_out_intervals": intervals(meter, classes=classes) if meter else {},
            "step_chosen_on_held_out": is_chosen and self.numbers["looks"] > 1,
            "not_shown": meter.not_shown(figures) if meter else [],
            "named_by_captions": bool(decoder.config.named),
        }
        shown = (held, found) if held else _of_fold(training)
        files = {training.state / PAGE: _page(training, result, *shown)}
        storage.publish(files | {training.state / "result.json": (json.dumps(result, indent=2) + "\n").encode()})
        checkpoint.remove(training.state)
        return result


def show_folds(training: TaskTraining, result: Mapping[str, Any], ranks: Ranks) -> None:
    """Makes the page of a finished training again, with the figures of a cross-validation that came later."""
    if ranks.is_first:
        held = training.held
        shown = (held, _judged(training, load_decoder(training.folder))[0]) if held else _of_fold(training)
        storage.publish({training.state / PAGE: _page(training, result, *shown)})


def shows_folds(folder: Path, folds: Mapping[str, Any]) -> bool:
    """Whether the page of a decoder's folder has these figures of cross-validation."""
    path = folder / "training" / PAGE
    return path.exists() and page.title_of(folds).encode() in path.read_bytes()


def _judged(training: TaskTraining, decoder: Decoder) -> tuple[list[Annotation], Meter]:
    """What a decoder says about the held-out images, and its figures on them."""
    found = _answers(training, training.held, decoder)
    return found, held_out.score(training.task, training.held, found)


def _answers(
    training: TaskTraining, lessons: TrainingViews, decoder: Decoder, views: Sequence[int] | None = None
) -> list[Annotation]:
    """What a decoder says about each view, or some of them."""
    given = (training.plan.words, training.framing["pixels_a_side"], training.device, training.tokenizer)
    return held_out.answers(decoder, lessons, *given, views=views)


def _of_fold(training: TaskTraining) -> tuple[TrainingViews | None, list[Annotation]]:
    """Some images with what a fold's decoder that has not seen them says, where there are folds."""
    if training.of_fold is None:
        return None, []
    views, folder = training.of_fold
    return views, _answers(training, views, load_decoder(folder))


def _page(
    training: TaskTraining, result: Mapping[str, Any], views: TrainingViews | None, found: Sequence[Annotation]
) -> bytes:
    steps, patience = str(result["steps"]), training.config.patience  # results of earlier versions lack some entries
    if result.get("stopped_early"):
        steps += f" of {training.plan.schedule.steps}: {patience} evaluations in turn brought no improvement"
    how = data_record.framed(training.framing)
    facts = {"data": training.config.data, "images learnt from": result["images"]}
    facts |= {"images held out": result["held_out_images"], "steps": steps}
    facts |= {"weights of step": result.get("weights_of_step", result["steps"])}
    facts |= {"pixels a side": f"{training.framing['pixels_a_side']}{f': {how}' if how else ''}"}
    facts |= {"outlines of labels": f"of the {whose}"} if (whose := result.get("outlines")) else {}
    facts |= {"command": training.command} if training.command else {}
    cautions = held_out.cautions(result, bool(training.folds))
    given = (training.lessons.source, facts, result, log_lines(training.state), cautions, training.folds)
    return page.page(training.task, *given, views, found, training.shown)
