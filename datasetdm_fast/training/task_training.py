"""One decoder's training in its folder: started, resumed or already finished, ending in weights and figures.

FOLDER/config.json, model.safetensors   the decoder, once training has finished
FOLDER/training/settings.json           everything that decides its weights
FOLDER/training/data.json               digests of the images and labels
FOLDER/training/checkpoint.safetensors  the training state, replaced from time to time
FOLDER/training/log.jsonl               losses and held-out figures
FOLDER/training/result.json             figures; page.html beside it shows them
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

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.checkpoint import round_parameters, save_decoder
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.device import multiplies_bf16, retain_freed
from datasetdm_fast.errors import Refused
from datasetdm_fast.training import checkpoint, data_record, predictions, word_heads
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.evaluation.meter import Meter, intervals
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.log import Log
from datasetdm_fast.training.predictions import Predictor
from datasetdm_fast.training.readers import parse_address
from datasetdm_fast.training.recipes import TrainingSchedule
from datasetdm_fast.training.settings import TaskSettings
from datasetdm_fast.training.splits import are_enough, count_unrelated
from datasetdm_fast.training.state import TrainingState
from datasetdm_fast.training.trainer import Trainer
from datasetdm_fast.training.word_heads import WordHeads
from datasetdm_fast.untrusted.documents import check_form, one_line

LOCK = ".lock"
LARGEST_STATE = 2**24  # bytes of a JSON file of a training
COUNTS = {"images", "held_out_images", "left_out", "steps"}  # settings that may follow from the number of images
REMOVED_SETTINGS: dict[str, Any] = {"quirks": [], "first_word_only": False}  # of earlier versions, with their defaults
RESULT_FORM = {"steps": int, "images": int, "held_out_images": int, "held_out": dict}  # in results of all versions


@dataclass(frozen=True)
class TaskPlan:
    decoder: DecoderConfig
    schedule: TrainingSchedule
    words: Tensor | None  # class embeddings
    settings: Mapping[str, Any]  # everything that decides the weights, as JSON, apart from the data
    data: Mapping[str, Any]  # the data record


def find_result(folder: Path, plan: TaskPlan) -> dict | None:
    """The result of a training that finished in this folder, None if there are steps left, or its weights are missing;
    other settings or data are refused.
    """
    state = folder / "training"
    if not storage.is_there(state / "settings.json"):
        if (folder / "config.json").exists():
            raise Refused(f"--out: {folder} holds a decoder that was not trained there", "Choose another --out.")
        return None
    record = state / data_record.NAME
    recorded = read_state(record, data_record.FORM, data_record.LARGEST_RECORD) if record.exists() else {}
    _check_settings(folder, read_state(state / "settings.json", {}), recorded, plan)
    files = state / "result.json", folder / "config.json", folder / "model.safetensors"
    if all(file.exists() for file in files):
        return read_state(files[0], RESULT_FORM)
    if recorded.get("version") != data_record.VERSION:
        raise Refused(f"--out: {folder} was begun by an earlier version", "Choose another --out.")
    return None


def _check_settings(folder: Path, stored: Mapping[str, Any], recorded: Mapping[str, Any], plan: TaskPlan) -> None:
    """Refuses to resume a training with other settings or on other data; model and data may lie elsewhere."""
    before, now = _flatten(stored), _flatten(plan.settings)
    differing = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    differing -= {name for name, default in REMOVED_SETTINGS.items() if before.get(name) == default}
    differing.discard("by_name")  # which decides the classes that the decoder names, and nothing else
    if "model_digests" not in differing:
        differing.discard("model")
    addresses = [parse_address(str(settings.get("data"))) for settings in (before, now)]
    is_alike = None not in addresses and addresses[0][::2] == addresses[1][::2]  # but for the folder
    if recorded.get("items") and is_alike:
        differing.discard("data")
    if recorded and differing <= COUNTS:
        items = map(data_record.with_names_below, (recorded["items"], plan.data["items"]), addresses)
        if changes := data_record.find_changes(*items):
            raise Refused(
                f"--out: {folder} was trained on other data: {changes}",
                "Restore the data, or choose another --out for a training on the data as they are.",
            )
    if differing:
        values = ", ".join(
            f"{name} {one_line(json.dumps(before.get(name)))} there, {one_line(json.dumps(now.get(name)))} now"
            for name in sorted(differing)[:4]
        )
        raise Refused(
            f"--out: {folder} was trained with other settings ({values})",
            "Choose another --out, or the settings that it was started with"
            + (" (--by-name no or yes decides what the decoder names)." if "decoder named" in differing else "."),
        )


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with each of the decoder's under its own name, so that a difference is reported in few words."""
    decoder = settings.get("decoder")
    inner = {f"decoder {name}": value for name, value in decoder.items()} if isinstance(decoder, dict) else {}
    return {name: value for name, value in settings.items() if name != "decoder" or not inner} | inner


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a training's folder, and removes what killed ones left half-written."""
    storage.make_folder(folder / "training")
    with storage.hold_lock(folder / "training" / LOCK):
        storage.remove_temporaries(folder)
        yield


def check_unlocked(out: Path, tasks: Sequence[str]) -> None:
    """Refuses the first training that is left of these tasks if another process is at it."""
    folders = (out / task / "training" for task in tasks)
    left = next((folder for folder in folders if not (folder / "result.json").exists()), None)
    if left is not None and (left / LOCK).exists():
        with storage.hold_lock(left / LOCK):
            pass


def read_state(path: Path, form: Mapping[str, Any], most: int = LARGEST_STATE) -> dict:
    """A JSON file of a training, an object with the entries of a form."""
    try:
        document = json.loads(storage.read(path, most))
        check_form(document, form)
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"{path}: not a file of a training ({error})", "Choose another --out, or restore it from a copy."
        ) from None
    return document


def resolve_dtype(requested: str, device: torch.device) -> str:
    if requested != "auto":
        return requested
    return "bf16" if device.type == "cuda" and multiplies_bf16(device) else "fp32"


@dataclass
class TaskTraining:
    """One decoder's training, with the evaluations and checkpoints between the steps of its trainer."""

    folder: Path
    plan: TaskPlan
    views: TrainingViews
    held_out: TrainingViews | None
    settings: TaskSettings
    framing: Mapping[str, Any]  # how images are brought to the model's size
    predictor: Predictor

    @property
    def task(self) -> str:
        return self.plan.decoder.task

    @property
    def state_folder(self) -> Path:
        return self.folder / "training"

    @property
    def state(self) -> TrainingState:
        return self.trainer.state

    @property
    def has_early_stopping(self) -> bool:
        """Whether weights are chosen by the held-out figure: of a few images, chance picks them far too early."""
        return self.held_out is not None and are_enough(len(self.held_out.numbers))

    def open(self) -> None:
        """Builds the trainer, at the step to go on from."""
        plan, dtype = self.plan, resolve_dtype(self.settings.dtype, self.predictor.device)
        self.trainer = Trainer(plan.decoder, plan.schedule, self.views, plan.words, self.predictor.device, dtype)
        self.saved, self.heads = time.monotonic(), WordHeads()
        if self.settings.by_word == "auto":
            self.heads = word_heads.learn_heads(self.views, plan.decoder, self.predictor.tokenizer)
        self.state.resume(self.state_folder)

    def train(self, log: Log, on_step: Callable, is_stopping: Callable[[], bool]) -> bool:
        """Takes the steps that are left; False if it was stopped before the last."""
        checks, steps, state = self.settings.checks, self.plan.schedule.steps, self.state
        while state.step < steps and not 0 < self.settings.patience <= state.early_stopping.without_improvement:
            if is_stopping():
                self.save()
                return False
            rate, loss, figure = self.trainer.rate(state.step), self.trainer.step(), None
            log.step(step := state.step, steps, loss, rate)
            if self.held_out and step * checks // steps > (step - 1) * checks // steps:
                figure = self.evaluate()
                if figure is not None:
                    log.figure(step, METRICS[self.task].held_out_figure, figure)
            on_step(step, loss, figure)
            if time.monotonic() - self.saved >= self.settings.save_every:
                self.save()
        return True

    def evaluate(self) -> float | None:
        """The held-out figure, None if all truth of these images is ignored; counts towards early stopping."""
        decoder, stopping = self._decoder(), self.state.early_stopping
        figure = self._score(decoder).result().get(METRICS[self.task].held_out_figure)
        stopping.evaluations += 1
        if figure is not None and self.has_early_stopping:
            is_improvement = predictions.is_better(self.task, figure, stopping.best_figure)
            self.state.record_evaluation(decoder, figure, is_improvement)
        return figure

    def _score(self, decoder: Decoder) -> Meter:
        return predictions.score(self.task, self.held_out, self.predictor.predict(decoder, self.held_out))

    def _decoder(self) -> Decoder:
        """The decoder as it would be saved now."""
        decoder = self.state.averaged_decoder()
        decoder.config = self.heads.add_to(decoder.config)
        return decoder

    def save(self) -> None:
        self.state.save(self.state_folder)
        self.saved = time.monotonic()

    def finish(self) -> dict:
        """Writes the decoder, the best by enough held-out images or else the last, and its figures."""
        state, views, held_out, settings = self.state, self.views, self.held_out, self.settings
        self.save()
        decoder, is_chosen = self._decoder(), self.has_early_stopping and bool(state.best_weights)
        if is_chosen:
            decoder.load_state_dict(state.best_weights)
        round_parameters(decoder, settings.storage)
        predict = partial(self.predictor.predict, decoder, views)
        decoder.config = predictions.choose_outlines(settings.outlines, decoder.config, views, predict)
        save_decoder(decoder, self.folder, storage=settings.storage)
        meter = self._score(decoder) if held_out else None
        figures = meter.result() if meter else {}
        classes = predictions.count_classes_shown(views) if meter and meter.columns else 0
        numbers = [*views.numbers, *(held_out.numbers if held_out else ())]
        heads = self.heads
        result = {
            "task": self.task,
            "images": len(views.numbers),
            "framing": dict(self.framing),
            "held_out_images": len(held_out.numbers) if held_out else 0,
            "unrelated_images": count_unrelated(views.source, numbers),
            "steps": state.step,
            "stopped_early": state.step < self.plan.schedule.steps,
            "weights_of_step": state.early_stopping.best_step if is_chosen else state.step,
            "loss": state.loss,
            "outlines": decoder.config.outlines,
            "words": {"masks": heads.masks, "named_rightly": heads.right, "read": bool(heads.shares)},
            "held_out": figures,
            "held_out_intervals": intervals(meter, classes=classes) if meter else {},
            "step_chosen_on_held_out": is_chosen and state.early_stopping.evaluations > 1,
            "not_shown": meter.not_shown(figures) if meter else [],
            "named_by_captions": bool(decoder.config.named),
        }
        storage.publish({self.state_folder / "result.json": (json.dumps(result, indent=2) + "\n").encode()})
        checkpoint.remove(self.state_folder)
        return result


def run_training(
    training: TaskTraining,
    on_step: Callable[[int, float, float | None], None] = lambda step, loss, figure: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> dict | None:
    """The result of the training, or None where it was stopped; the same call then resumes, to the same bits."""
    plan = training.plan
    retain_freed()
    if not (settings := training.state_folder / "settings.json").exists():
        record = {training.state_folder / data_record.NAME: data_record.as_json(plan.data)}
        storage.publish(record | {settings: (json.dumps(plan.settings, indent=2) + "\n").encode()})  # which come last
    training.open()
    try:
        with Log(training.state_folder, training.state.step, training.settings.log) as log:
            if not training.train(log, on_step, is_stopping):
                return None
        return training.finish()
    finally:
        training.trainer.close()
