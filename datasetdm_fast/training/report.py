"""What a training reports on the terminal: its plan, its figures, and what limits them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.config import FROM_IMAGE
from datasetdm_fast.messages import count_noun, list_names
from datasetdm_fast.training.cross_validation import is_worse
from datasetdm_fast.training.evaluation.meter import figure_name
from datasetdm_fast.training.session import PERSON, TrainingSession
from datasetdm_fast.training.settings import TaskSettings
from datasetdm_fast.training.splits import AUTO_FOLDS, ENOUGH_IMAGES, LEAST_IMAGES, are_enough
from datasetdm_fast.training.task_training import TaskPlan

MOST_NAMED = 5  # classes that a line lists


def describe_plans(
    session: TrainingSession,
    plans: Mapping[str, TaskPlan],
    results: Mapping[str, Any],
    settings: TaskSettings,
    folds: int = 0,
) -> Iterator[str]:
    """The lines before a training: data, captures, and each decoder with its steps."""
    (training, held_out), size = session.split, session.engine.model.size
    framing = describe_framing(session.framing)
    views = count_noun(session.view_settings.draws, "view")
    yield f"data       {session.address}"
    yield (
        f"images     {len(training)} to learn from in {views} each, {len(held_out)} held out, "
        f"{size} pixels a side{f' ({framing})' if framing else ''}"
    )
    yield f"captures   {session.cache_plan(next(iter(plans)))}"
    patience = settings.patience
    early = f", fewer once {patience} of {settings.checks} evaluations in turn bring no improvement"
    for task, plan in plans.items():
        schedule, is_finished = plan.schedule, results[task] is not None
        yield (
            f"{task:<10} {plan.decoder.kind} decoder, {count_noun(schedule.steps, 'step')} of "
            f"{count_noun(schedule.batch_size, 'view')}{early if patience and are_enough(len(held_out)) else ''}"
            f"{' - finished' if is_finished else ''}"
        )
    if named := list(dict.fromkeys(name for plan in plans.values() for name in plan.decoder.named)):
        some = list_names(named, MOST_NAMED)
        yield f"by name    {some}: only where a prompt names them (--by-name no: in every picture)"
    elif session.recipe_settings.by_name == "yes" and any(plan.decoder.classes for plan in plans.values()):
        is_without = session.view_settings.captions == "none"
        why = "--captions none trains without prompts" if is_without else "captions leave out what pictures show"
        yield f"by name    none: {why}, so every class is looked for in every picture"
    if folds:
        yield f"folds      {folds} more decoders of each kind, each to judge a share of the images"
        for task, plan in plans.items():
            steps = plan.schedule.steps * (folds + (results[task] is None))
            times = f"{steps / plan.schedule.steps:.2g} times those of one decoder"
            yield f"{task:<10} {count_noun(steps, 'step')} in all, {times}"


def describe_framing(framing: Mapping[str, Any]) -> str:
    """How images are brought to the model's size, in words; empty where all have it."""
    scaled, cut, pictures = (framing[name] for name in ("scaled", "cut_to_a_square", "pictures"))
    if not scaled:
        return ""
    if framing["framing"] == PERSON:
        each = "each in the middle of a square" if pictures > 1 else "in the middle of a square"
        return f"{count_noun(pictures, 'person')}, {each} that is cut out and scaled to that"
    of_all = count_noun(pictures, "picture")
    which = f"all {of_all} are" if scaled == pictures > 1 else f"{scaled} of {of_all} {'is' if scaled == 1 else 'are'}"
    square = "a square that DatasetDM's rule draws" if framing["framing"] == "upstream" else "the square in the middle"
    some = f", {cut} of them cut to {square}" if cut else ""
    return f"{which} scaled to that{f' and cut to {square}' if cut == scaled else some}"


def describe_result(
    out: Path,
    task: str,
    result: Mapping[str, Any],
    folds: Mapping[str, Any] | None,
    check: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """The lines after a training: its figures, the most reliable first, and at last what is wrong with the decoder."""
    if folds:
        images = count_noun(folds["images"], "image")
        yield f"{task}: {folds['folds']}-fold {_figures(images, folds['held_out'], folds['held_out_intervals'])}"
    steps, held_out = count_noun(result["steps"], "step"), count_noun(result["held_out_images"], "held-out image")
    if result.get("stopped_early"):
        steps += f", stopped early, weights of step {result.get('weights_of_step')}"
    figures = _figures(held_out, result["held_out"], result.get("held_out_intervals", {}))
    yield f"{task}: {steps}; {figures}" if result["held_out"] else f"{task}: {steps}"
    yield from (f"  {note}" for note in cautions(result, bool(folds)))
    if check:
        inside = check["samples"] - check["out_of_domain"]
        yield f"  {inside} of {check['samples']} samples generated from its captions are like its pictures"
    yield f"  look at {out}/{task}/training/page.html"
    yield from (f"{task}: {warning}" for warning in describe_warnings(task, folds, check))


def describe_warnings(task: str, folds: Mapping[str, Any] | None, check: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with a decoder: its training ended worse than those of the folds, or its model does not draw what
    it was trained on.
    """
    warnings = []
    if folds and (final := folds.get("final")) and is_worse(task, final):
        values = ", ".join(f"{value:.3f}" for value in sorted(final["folds"]))
        warnings.append(
            f"the training ended badly: {figure_name(final['figure'])} {final['value']:.3f} on images on which the "
            f"decoders of the folds have {values}; train again with another --seed and --out"
        )
    if check and 2 * check["out_of_domain"] > check["samples"]:
        warnings.append(
            f"{check['out_of_domain']} of {check['samples']} samples generated from its captions are unlike its "
            "pictures: the model does not draw what the decoder was trained on, or not from such captions, or the "
            "training was too short; name another --model, give pictures captions of their own, or raise --steps"
        )
    return warnings


def _figures(images: str, figures: Mapping[str, Any], bounds: Mapping[str, list[float]]) -> str:
    """Each figure on so many images, with its interval."""
    values = (
        f"{figure_name(name)} {format_figure(value, bounds.get(name))}"
        for name, value in figures.items()
        if isinstance(value, float)
    )
    return f"on {images}{' (95 % intervals)' if bounds else ''}: {'  '.join(values)}"


def format_figure(value: float, bounds: object) -> str:
    """A figure with its interval, where it has one."""
    return f"{value:.4f}" + (f" ({bounds[0]:.4f} to {bounds[1]:.4f})" if isinstance(bounds, list) else "")


def cautions(result: Mapping[str, Any], has_folds: bool = False) -> list[str]:
    """The limits of a result's held-out figures; `has_folds` where cross-validation has better ones."""
    notes, images = [], result["held_out_images"]
    unrelated = result.get("unrelated_images", images + result["images"])  # missing in results of earlier versions
    folds = min(AUTO_FOLDS, unrelated)
    few = f"{count_noun(images, 'image is', 'images are')} too few for a figure to rely on"
    unmeasured = "no image was held out to measure it"
    if result.get("step_chosen_on_held_out"):
        notes.append("the step of the weights was chosen on the same images, so that other images will score lower")
    if are_enough(images):
        pass
    elif has_folds:
        notes.append(
            f"{few}: see those of cross-validation" if images else f"{unmeasured}: see the figures of cross-validation"
        )
    elif images:
        is_possible = (images + result["images"]) // 2 >= ENOUGH_IMAGES
        more = f"raise --held-out to {ENOUGH_IMAGES} images or more, or " if is_possible else ""
        notes.append(
            f"{few}: --folds auto measures on all of them by cross-validation ({folds} more trainings); or "
            f"{more}evaluate on other data"
        )
    elif unrelated < 2:
        notes.append(f"{unmeasured}: evaluate on other data")
    else:
        folds = folds if result["images"] >= LEAST_IMAGES else 2
        notes.append(
            f"{unmeasured}: --folds {folds} measures on all of them by cross-validation; or evaluate on other data"
        )
    if missing := result.get("not_shown"):
        them = "it" if len(missing) == 1 else "them"
        notes.append(
            f"no held-out image shows {list_names(missing, MOST_NAMED)}: means leave {them} out, and intervals allow "
            "for any score"
        )
    if images and result.get("outlines") == FROM_IMAGE:
        notes.append("labels have outlines that follow the image; figures of single steps were measured without them")
    if result.get("named_by_captions") and (images or has_folds):
        notes.append(
            "where an image's caption names classes, only these were looked for; evaluate --captions unread measures "
            "without this"
        )
    return notes
