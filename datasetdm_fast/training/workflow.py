"""The trainings of one command: each task's cross-validation, decoder and page, one task after the other."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasetdm_fast.cores import in_blocks
from datasetdm_fast.data import Sample, Trust
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders import domain
from datasetdm_fast.engine.decoders.checkpoint import load_decoder
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines import Engine, build_engine
from datasetdm_fast.engine.engines.device import is_out_of_memory, slow_in_fp16
from datasetdm_fast.engine.loop.inversion import invert_for
from datasetdm_fast.engine.pictures.labelled import Labelled
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.training import checkpoint, page, report
from datasetdm_fast.training.cross_validation import compare_with_folds, cross_validate, fold_folder, read_folds
from datasetdm_fast.training.predictions import BATCH_SIZE
from datasetdm_fast.training.session import Stopped, TrainingSession
from datasetdm_fast.training.settings import TaskSettings
from datasetdm_fast.training.splits import count_folds, group_related, split_folds
from datasetdm_fast.training.task_training import TaskPlan, find_result, lock_folder, read_state, run_training
from datasetdm_fast.training.trainer import project

PAGE = "page.html"
Progress = Callable[[str, str, int, int], Any]  # task, title, steps, steps of later trainings -> context with on_step
DOMAIN_IMAGES = 200  # that are measured, evenly over all
DOMAIN_DRAWS = 4  # noises of each
CHECK_FILE = "self_check.json"
CHECK_SAMPLES, CHECK_STEPS = 16, 20
CHECK_CAPTIONS = 40  # captions that are chosen from


@dataclass(frozen=True)
class TrainingOutcome:
    """The result of a task's training, None where it was stopped, and the figures of its cross-validation."""

    result: dict[str, Any] | None
    folds: Mapping[str, Any] | None
    check: Mapping[str, Any] | None = None  # counts of the self-check

    @property
    def document(self) -> dict[str, Any] | None:
        """Both as one object."""
        parts = {"folds": self.folds, "self_check": self.check}
        return self.result and self.result | {name: part for name, part in parts.items() if part}


@dataclass(frozen=True)
class Workflow:
    session: TrainingSession
    out: Path
    tasks: Sequence[str]
    settings: TaskSettings
    folds: str  # --folds

    def prepare(self) -> dict[str, TaskPlan]:
        """The plan of each task, after every check that can refuse it; reports the work that is left."""
        if self.settings.dtype == "fp16" and self.session.engine.device.type == "cpu":
            raise slow_in_fp16("--dtype")
        plans = {task: self.session.plan(task) for task in self.tasks}
        results = {task: find_result(self.out / task, plan) for task, plan in plans.items()}
        for line in report.describe_plans(self.session, plans, results, self.settings, self._fold_count):
            self.session.on_message(line)
        return plans

    @property
    def _fold_count(self) -> int:
        session = self.session
        return count_folds(self.folds, session.source, session.numbers, len(session.split[1]))

    def run(
        self, plans: Mapping[str, TaskPlan], command: str, progress: Progress, is_stopping: Callable[[], bool]
    ) -> dict[str, TrainingOutcome]:
        """Trains every task, and resumes or skips those that have begun; stops after the first that is stopped."""
        outcomes = {}
        for task, plan in plans.items():
            folder = self.out / task
            result = find_result(folder, plan)
            if result is not None:  # killed in its last moment
                checkpoint.remove(folder / "training")
            if result is not None and not self._fold_count and (folder / "training" / PAGE).exists():
                outcomes[task] = TrainingOutcome(result, read_folds(folder), read_check(folder))
                continue
            with lock_folder(folder):
                outcomes[task] = self._run_task(task, plan, command, progress, is_stopping)
            if outcomes[task].result is None:
                break
        return {task: outcomes.get(task, TrainingOutcome(None, None)) for task in plans}

    def _run_task(
        self, task: str, plan: TaskPlan, command: str, progress: Progress, is_stopping: Callable[[], bool]
    ) -> TrainingOutcome:
        session, folder, count = self.session, self.out / task, self._fold_count
        steps, result = plan.schedule.steps, find_result(folder, plan)  # which may have come before it was locked
        left = 0 if result else steps
        folds: Mapping[str, Any] | None = read_folds(folder)
        if count:

            def fold_progress(number: int, steps: int) -> Any:
                return progress(task, f"{task}, fold {number} of {count},", steps, (count - number) * steps + left)

            folds = cross_validate(session, task, folder, count, self.settings, fold_progress, is_stopping)
            if folds is None:
                return TrainingOutcome(None, None)
        is_shown = result is not None and page.shows_folds(folder / "training" / PAGE, folds)
        if result is None:
            training = session.open_training(folder, plan, self.settings, is_stopping)
            if training is not None:
                with progress(task, task, steps, 0) as shown:
                    result = run_training(training, shown.on_step, is_stopping)
            if result is None:
                return TrainingOutcome(None, folds)
            del training
        if not is_shown:
            try:
                has_domain = (folder / domain.FILE).exists()
                if not has_domain and (measured := measure_domain(session, load_decoder(folder), is_stopping)):
                    domain.write_domain(folder, measured)
                folds = folds and compare_with_folds(session, plan, folder, folds)
                self._write_page(task, plan, result, folds, command, is_stopping)
            except Stopped:
                return TrainingOutcome(None, folds)
        return TrainingOutcome(result, folds, read_check(folder))

    def _write_page(
        self,
        task: str,
        plan: TaskPlan,
        result: Mapping[str, Any],
        folds: Mapping[str, Any] | None,
        command: str,
        is_stopping: Callable[[], bool],
    ) -> None:
        """Writes the page, with labels of held-out images, or else of images that the first fold was not trained on."""
        session, folder = self.session, self.out / task
        shown, title, decoder_folder = session.split[1], "Held-out images", folder
        if not shown and folds:
            first = split_folds(session.source, session.numbers, folds["folds"], session.view_settings.seed)[0]
            shown, title = first, "Images that the decoder of the first fold has not seen"
            decoder_folder = fold_folder(folder, folds["folds"], 1)
        views = session.views(task, shown[: page.SHOWN], 1) if shown else None
        labels = session.predictor(plan).predict(load_decoder(decoder_folder), views) if views else []
        steps, framing = str(result["steps"]), report.describe_framing(session.framing)
        if result.get("stopped_early"):
            patience = self.settings.patience
            steps += f" of {plan.schedule.steps}: {patience} evaluations in turn brought no improvement"
        facts = {
            "data": session.address,
            "images learnt from": result["images"],
            "images held out": result["held_out_images"],
            "steps": steps,
            "weights of step": result.get("weights_of_step", result["steps"]),
            "pixels a side": f"{session.engine.model.size}{f': {framing}' if framing else ''}",
            "outlines of labels": f"of the {result['outlines']}" if "outlines" in result else "",
            page.COMMAND: command,
        }
        facts = {name: value for name, value in facts.items() if value != ""}
        samples = check_itself(session, load_decoder(folder), folder, is_stopping)
        warnings = report.describe_warnings(task, folds, read_check(folder) if samples else None)
        cautions = [*warnings, *report.cautions(result, bool(folds))]
        content = page.page(task, session.source, facts, result, cautions, folds, views, labels, title, samples)
        storage.publish({folder / "training" / PAGE: content})


def measure_domain(
    session: TrainingSession, decoder: Decoder, is_stopping: Callable[[], bool] = lambda: False
) -> domain.Domain | None:
    """The domain of the session's pictures as this decoder, which was loaded for inference, reads them; None where they
    are too few.
    """
    task, numbers = decoder.config.task, session.numbers
    count = min(len(numbers), DOMAIN_IMAGES)
    chosen = [numbers[k * len(numbers) // count] for k in range(count)]
    members = group_related(session.source, chosen, domain.LEAST_IMAGES)
    if len(members) < domain.LEAST_IMAGES:
        return None
    title, total = f"{task} domain", count * DOMAIN_DRAWS
    views = session.views(task, chosen, DOMAIN_DRAWS, on_views=session.watch_work(title, total, is_stopping))
    on_read = session.watch_work(title, total, is_stopping)  # which is long where captures are not cached
    sketches, labels = [], []
    decoder = decoder.to(session.engine.device)
    with torch.inference_mode():
        for batch in in_blocks(range(len(views)), BATCH_SIZE):
            levels = [level.to(session.engine.device) for level in views.captures.batch(batch)]
            sketches.append(decoder.sketch(project(decoder, levels)).cpu().numpy())
            labels += [TASKS[task].truth(session.source, views.item(view)) for view in batch]
            on_read(len(batch))
    group_of = {number: group for group, related in members.items() for number in related}
    groups = [group_of[number] for number in chosen for _ in range(DOMAIN_DRAWS)]
    return domain.learn_domain(np.concatenate(sketches), labels, groups)


def check_itself(
    session: TrainingSession, decoder: Decoder, folder: Path, is_stopping: Callable[[], bool] = lambda: False
) -> Sequence[Sample]:
    """Samples of the captions of training images, whose counts are written into the decoder's folder; none for a
    decoder without a domain, and where captions or memory do not allow it.
    """
    if decoder.domain is None or not (items := _choose_captioned(session)):
        return ()
    task, engine = decoder.config.task, session.engine
    captions = [item.caption for item in items]
    is_stored = all(item.named is None for item in items)
    options = {"dtype": engine.fingerprint()["dtype"], "device": str(engine.device)}
    measured = decoder.domain = replace(decoder.domain, model=0.0)  # which is measured anew
    try:
        pipeline = Pipeline(build_engine(engine.name, engine.model, {task: decoder}, **options))
        size = min(len(captions), pipeline.engine.suggested_batch())
        steps = min(CHECK_STEPS, engine.model.defaults.steps)
        on_steps = session.watch_work(f"{task} samples", -(-len(captions) // size) * steps, is_stopping)

        def on_step(step: int, latents: torch.Tensor) -> None:
            on_steps(1)

        samples = pipeline(captions, tasks=(task,), steps=steps, batch_size=size, callback=on_step).samples
        if len(samples) >= domain.LEAST_IMAGES:
            farthest = domain.FARTHEST_MEAN if is_stored else domain.FARTHEST_OF_NAMES
            pictures = min(len(group_related(session.source, session.numbers, domain.LEAST_IMAGES)), DOMAIN_IMAGES)
            measured = measured.with_generated(_sketch_samples(pipeline.engine, task, samples), pictures, farthest)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return ()
    if len(samples) >= domain.LEAST_IMAGES:
        domain.write_domain(folder, measured)
    trusts = [sample.trust or Trust() for sample in samples]
    distances = [max(trust.domain or 0.0, measured.model if measured.model > 1 else 0.0) for trust in trusts]
    trusts = [replace(trust, domain=distance) for trust, distance in zip(trusts, distances, strict=True)]
    samples = [replace(sample, trust=trust) for sample, trust in zip(samples, trusts, strict=True)]
    counts = {"samples": len(samples), "out_of_domain": sum(distance > 1 for distance in distances)}
    storage.publish({folder / "training" / CHECK_FILE: (json.dumps(counts, indent=2) + "\n").encode()})
    return samples


def _sketch_samples(engine: Engine, task: str, samples: Sequence[Sample]) -> np.ndarray:
    """[N, D, h, w] of samples as a decoder of the engine reads their pictures, like those of the training images."""
    sketches = []
    for batch in in_blocks(samples, BATCH_SIZE):
        images = torch.from_numpy(np.stack([sample.image for sample in batch]))
        captions, seeds = zip(*((sample.request.prompt, sample.request.seed) for sample in batch), strict=True)
        with torch.inference_mode():
            capture = invert_for(engine, (task,), images, captions, seeds)[task]
            sketches.append(engine.decoders[task].sketch(capture.of(task)).cpu().numpy())
    return np.concatenate(sketches)


def _choose_captioned(session: TrainingSession) -> list[Labelled]:
    """Training images from all over the data, of those whose captions the text encoder reads whole."""
    tokenizer, numbers = session.engine.model.tokenizer, session.split[0]
    items = [session.source[number] for number in numbers[:: -(-len(numbers) // CHECK_CAPTIONS)]]
    short = [item for item in items if len(tokenizer(item.caption).input_ids) <= tokenizer.model_max_length]
    count = min(CHECK_SAMPLES, len(short))
    return [short[k * len(short) // count] for k in range(count)]


def read_check(folder: Path) -> Mapping[str, Any] | None:
    """The counts of a decoder's self-check."""
    path = folder / "training" / CHECK_FILE
    return read_state(path, {"samples": int, "out_of_domain": int}) if path.exists() else None
