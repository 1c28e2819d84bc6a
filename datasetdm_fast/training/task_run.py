"""One decoder's training in its folder: started, resumed or found finished, ending in weights, figures and a page.

FOLDER/config.json, model.safetensors   the decoder, once it is done
FOLDER/training/settings.json           what decides its weights
FOLDER/training/checkpoint.safetensors  the whole state, replaced from time to time
FOLDER/training/log.jsonl               losses and held-out figures
FOLDER/training/result.json, page.html  figures, and answers beside the truth
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasetdm_fast.decoders.checkpoint import Decoder, save_decoder
from datasetdm_fast.decoders.config import DecoderConfig
from datasetdm_fast.disk import locks, storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.evaluation.metrics import METRICS
from datasetdm_fast.training import checkpoint, held_out, page
from datasetdm_fast.training.log import Log
from datasetdm_fast.training.loop import Trainer, TrainingViews
from datasetdm_fast.training.processes import SOLO, Ranks
from datasetdm_fast.training.schedule import TrainingSchedule

LOCK = ".lock"
LARGEST_STATE = 2**24  # bytes of a JSON file of a training


@dataclass(frozen=True)
class TaskTraining:
    """What is taught, from what, into which folder."""

    folder: Path
    config: DecoderConfig
    schedule: TrainingSchedule
    lessons: TrainingViews
    held: TrainingViews | None
    words: Tensor | None
    size: int  # pixels of a side
    settings: Mapping[str, Any]  # what decides the weights, as JSON
    checks: int = 10  # looks at the held-out images
    patience: int = 4  # looks without a better figure before it ends early; 0 = it does not
    storage: str = "fp32"
    save_every: float = 60.0  # seconds between checkpoints
    device: torch.device | str = "cpu"
    dtype: str = "fp32"

    @property
    def task(self) -> str:
        return self.config.task

    @property
    def state(self) -> Path:
        return self.folder / "training"


def finished(folder: Path, settings: Mapping[str, Any]) -> dict | None:
    """The result of a training that ended here, None where there is work left; other settings are refused."""
    path = folder / "training" / "settings.json"
    if not storage.is_there(path):
        if (folder / "config.json").exists():
            raise Refused(f"--out: {folder} holds a decoder that was not trained there", "choose another --out")
        return None
    before = _read(path)
    if differing := sorted(
        name for name in {*before, *settings} if before.get(name) != json.loads(json.dumps(settings)).get(name)
    ):
        said = ", ".join(
            f"{name} {json.dumps(before.get(name))} there, {json.dumps(settings.get(name))} now"
            for name in differing[:4]
        )
        raise Refused(
            f"--out: {folder} was trained with other settings ({said})",
            "choose another --out, or the settings it was begun with",
        )
    result = folder / "training" / "result.json"
    return _read(result) if result.exists() else None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other trainings out of a training's folder."""
    storage.make_folder(folder / "training")
    with locks.locked(folder / "training" / LOCK):
        yield


def _read(path: Path) -> dict:
    try:
        found = json.loads(storage.read(path, LARGEST_STATE))
    except ValueError as error:
        raise Refused(f"{path}: not JSON ({error})", "choose another --out, or restore it from a copy") from None
    if not isinstance(found, dict):
        raise Refused(f"{path}: holds no settings", "choose another --out, or restore it from a copy")
    return found


def run(
    training: TaskTraining,
    ranks: Ranks = SOLO,
    on_unet_call: Callable[[int, float, float | None], None] = lambda step, loss, figure: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> dict | None:
    """The result of the training, or None where it was stopped; the same call again then goes on, to the same bits."""
    if ranks.is_first:
        storage.publish({training.state / "settings.json": (json.dumps(training.settings, indent=2) + "\n").encode()})
    trainer = Trainer(
        training.config,
        training.schedule,
        training.lessons,
        training.words,
        training.device,
        training.dtype,
        ranks,
        is_ahead=training.lessons.captures.is_stored,
    )
    try:
        journey = _Journey(training, trainer, ranks)
        with Log(training.state, trainer.done, is_writing=ranks.is_first) as log:
            if not journey.travel(log, on_unet_call, is_stopping):
                return None
        result = journey.end() if ranks.is_first else None
        return ranks.said(result)
    finally:
        trainer.close()


class _Journey:
    """A trainer between its first and last step, with the best it has been."""

    def __init__(self, training: TaskTraining, trainer: Trainer, ranks: Ranks):
        self.training, self.trainer, self.ranks = training, trainer, ranks
        self.best: dict[str, Tensor] = {}
        self.numbers: dict[str, Any] = {"figure": None, "step": 0, "worse": 0, "has_ended": False, "last": None}
        self.saved = time.monotonic()
        if (found := checkpoint.read(training.state)) is not None:
            tensors, numbers = found
            try:
                trainer.restore(tensors, numbers["trainer"])
            except (KeyError, RuntimeError) as error:
                first = str(error).splitlines()[0]
                raise Refused(
                    f"{training.state / checkpoint.NAME}: not the state of this training ({first})",
                    "delete it to train from the start",
                ) from error
            self.numbers |= numbers["journey"]
            self.best = {
                name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")
            }

    def travel(self, log: Log, on_unet_call: Callable, is_stopping: Callable[[], bool]) -> bool:
        """Whether the end was reached."""
        schedule = self.training.schedule
        every = max(schedule.steps // self.training.checks, 1)
        while self.trainer.done < schedule.steps and not self.numbers["has_ended"]:
            if self._is_stopping(is_stopping):
                self.save()
                return False
            rate, loss = self.trainer.rate(self.trainer.done), self.trainer.step()
            step, figure = self.trainer.done, None
            self.numbers["last"] = loss
            log.step(step, schedule.steps, loss, rate)
            if self.training.held and (step % every == 0 or step == schedule.steps):
                figure = self.look()
                log.figure(step, METRICS[self.training.task].held_out_figure, figure)
            on_unet_call(step, loss, figure)
            if self.ranks.is_first and time.monotonic() - self.saved >= self.training.save_every:
                self.save()
        return True

    def _is_stopping(self, is_stopping: Callable[[], bool]) -> bool:
        """Whether any process was asked to stop."""
        if self.ranks.world == 1:
            return is_stopping()
        flag = torch.tensor([float(is_stopping())], device=self.training.device)
        self.ranks.total([flag])
        return bool(flag.item())

    def look(self) -> float:
        """The held-out figure now; the weights are kept where it is the best so far."""
        training, numbers = self.training, self.numbers
        decoder, figure = self.trainer.finished(), None
        if self.ranks.is_first:
            found = held_out.answers(
                decoder, training.held, self.trainer.words, training.size, torch.device(training.device)
            )
            figure = held_out.score(training.task, training.held, found)[METRICS[training.task].held_out_figure]
        figure = float(self.ranks.said(figure))
        if held_out.is_better(training.task, figure, numbers["figure"]):
            self.best = {name: value.detach().cpu().clone() for name, value in decoder.state_dict().items()}
            numbers |= {"figure": figure, "step": self.trainer.done, "worse": 0}
        else:
            numbers["worse"] += 1
            numbers["has_ended"] = bool(training.patience) and numbers["worse"] >= training.patience
        return figure

    def save(self) -> None:
        if self.ranks.is_first:
            tensors, numbers = self.trainer.state()
            tensors |= {f"best.{name}": value for name, value in self.best.items()}
            checkpoint.write(self.training.state, tensors, {"trainer": numbers, "journey": self.numbers})
        self.saved = time.monotonic()

    def end(self) -> dict:
        """Writes the decoder, its figures and its page."""
        training = self.training
        self.save()
        decoder = self.decoder()
        save_decoder(decoder, training.folder, storage=training.storage)
        figures = {}
        files = {}
        if training.held:
            found = held_out.answers(
                decoder, training.held, self.trainer.words, training.size, torch.device(training.device)
            )
            figures = held_out.score(training.task, training.held, found)
            facts = {
                "images learnt from": training.lessons.images,
                "steps": self.trainer.done,
                "weights of step": self.numbers["step"],
            }
            files[training.state / "page.html"] = page.page(training.task, training.held, found, facts, figures)
        result = {
            "task": training.task,
            "images": training.lessons.images,
            "held_out_images": training.held.images if training.held else 0,
            "steps": self.trainer.done,
            "weights_of_step": self.numbers["step"] or self.trainer.done,
            "loss": self.numbers["last"],
            "held_out": figures,
        }
        storage.publish({**files, training.state / "result.json": (json.dumps(result, indent=2) + "\n").encode()})
        checkpoint.remove(training.state)
        return result

    def decoder(self) -> Decoder:
        """The best by the held-out images, else the last."""
        decoder = self.trainer.finished()
        if self.best:
            decoder.load_state_dict(self.best)
        return decoder


def settings_of(config: DecoderConfig, schedule: TrainingSchedule, others: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides a decoder's weights, as JSON."""
    return json.loads(json.dumps({"decoder": json.loads(config.to_json()), **asdict(schedule), **others}))
