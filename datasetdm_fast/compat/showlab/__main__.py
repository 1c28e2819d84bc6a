"""python -m datasetdm_fast.compat.showlab SCRIPT: a line of DatasetDM's script/*.sh, run by this package."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_unfinished
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.compat.showlab.demo import Demo
from datasetdm_fast.compat.showlab.files import Answer, jpeg
from datasetdm_fast.compat.showlab.lines import Line, read_line
from datasetdm_fast.compat.showlab.order import Order, order_of
from datasetdm_fast.compat.showlab.scripts import GENERATORS, Generator
from datasetdm_fast.compat.showlab.showing import SHOWERS, Shower, show
from datasetdm_fast.compat.showlab.splicing import SPLICERS, Splicer, splice
from datasetdm_fast.compat.showlab.training import TRAINERS, TrainingScript, checkpoint_of, line_of_train, shown
from datasetdm_fast.errors import Refused, nearest, renamed_flags
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.untrusted import documents

PROG = "python -m datasetdm_fast.compat.showlab"
RUNNER = "datasetdm_fast.compat.scripts"  # of `run`, which runs a script of a checkout itself
TRAIN = "datasetdm_fast.train"
DEMO = Demo()
SCRIPTS = {**GENERATORS, DEMO.name: DEMO, **TRAINERS, **SPLICERS, **SHOWERS}
GONE = {  # names that a reader of DatasetDM may try -> why they are not there, and what is
    "train": (
        "train.py trains a decoder that no generator of DatasetDM reads",
        "Use one of the other trainers, such as train_semantic_voc.",
    ),
    "evaluation_Cityscapes": (
        "DatasetDM's script/evaluation.sh names this script, but DatasetDM lacks it",
        "Use python -m datasetdm_fast.evaluate to measure labels.",
    ),
}


@command
def main(arguments: Sequence[str]) -> int:
    """The exit code of the script named by the first argument."""
    name = arguments[0].removesuffix(".py").rpartition("/")[2] if arguments else ""
    if name in ("-h", "--help", ""):
        return _help()
    if name == "run":
        return import_module(RUNNER).main(arguments[1:])
    if name.startswith("--"):
        return _make_again(arguments)
    if name in GONE:
        raise Refused(f"{PROG}: {GONE[name][0]}", GONE[name][1])
    if name not in SCRIPTS:
        raise Refused(
            f"{PROG}: unknown script {name!r}{nearest(name, (*SCRIPTS, 'run'))}", f"`{PROG} --help` lists them."
        )
    script, again = SCRIPTS[name], f"{PROG} {shlex.join(arguments)}"
    others = {each: {flag.name for flag in one.flags} for each, one in SCRIPTS.items()}
    line = read_line(PROG, name, script.told, script.flags, arguments[1:], others)
    if isinstance(script, (Generator, Demo)):
        with renamed_flags({"--out": "--outdir"}):
            return generate(planned(script, line), line, again)
    if isinstance(script, Shower):
        out, count = show(script, line)
        _say(line, f"{count} pictures")
        print(out, flush=True)
        return 0
    return teach(script, line, again) if isinstance(script, TrainingScript) else join(script, line, again)


def _help() -> int:
    print(f"usage: {PROG} SCRIPT [flags of the script]\n")
    for name, each in SCRIPTS.items():
        print(f"  {name}\n      {each.told}")
    print("  run SCRIPT.py\n      A script of a checkout of DatasetDM itself, with our modules in place of its own.")
    print("\nSCRIPT --help lists the flags. docs/from-datasetdm.md says what differs.")
    return 0


@dataclass(frozen=True)
class Planned:
    """What a line makes, and the files of each of its images."""

    order: Order
    folders: tuple[str, ...]  # of the output
    names: Callable[[int], list[str]]
    filed: Callable[..., dict[str, bytes]]


def planned(script: Generator | Demo, line: Line) -> Planned:
    if isinstance(script, Demo):
        order = script.order(line)
        return Planned(order, script.folders, partial(script.names, order), partial(script.files, order))
    order = order_of(script, line)
    return Planned(order, script.folders, partial(names_of, script, order), partial(files_of, script, order))


def generate(plan: Planned, line: Line, again: str) -> int:
    """Makes the images of a line, or what is missing of them."""
    from datasetdm_fast.compat.showlab import generating, telling

    order, names = plan.order, plan.names
    stored = generating.begun(order, plan.folders)
    if result := generating.already(order, stored, names):
        _say(line, f"{order.out}: complete with {count_noun(result.done, 'image')}, nothing to do")
        return _end(line, order.out, result)
    job = generating.prepare(order, plan.filed, stored)
    _say(line, *telling.rows(order, job))
    if line["dry_run"]:
        for item in order.items:
            print(f"{item.stem}  seed {item.seed}  {item.prompt!r}")
        return 0
    left, together = job.plan.number - job.done, job.plan.batch_size if line["together"] else 1
    with (
        Interruption(line["quiet"]) as interruption,
        ImageProgress(min(left, line["limit"] or left), line["quiet"], together, len(job.recipe.schedule)) as progress,
    ):
        result = generating.make(
            order,
            job,
            names,
            on_commit=progress.on_commit,
            on_unet_call=progress.on_unet_call,
            is_stopping=interruption.is_stopping,
        )
    images = f"{count_noun(result.made, 'image')} in {format_duration(result.seconds)}"
    _say(line, f"{images}; look at {result.path}/gallery/index.html")
    code = _end(line, order.out, result)
    if not result.is_complete:
        print_unfinished(result.done, result.number, f"go on with: {again}", "images")
    return interruption.exit_code(code)


def teach(trainer: TrainingScript, line: Line, again: str) -> int:
    """Teaches a decoder, or goes on with it, and leaves its checkpoint."""
    from datasetdm_fast.compat.showlab import telling

    words = line_of_train(trainer, line)
    kept = f"kept      {trainer.quirk or 'one image a step'}, DatasetDM's recipe"
    _say(line, *telling.ignored(line), f"command   {shown(words)}", kept)
    if (code := import_module(TRAIN).main(words)) or line["dry_run"]:
        return code
    if (path := checkpoint_of(trainer, line)) is None:
        print(f"stopped; go on with: {again}", file=sys.stderr)
        return 0
    _say(line, f"{path}: a state dict as DatasetDM saves and loads it")
    print(path, flush=True)
    return 0


def join(splicer: Splicer, line: Line, again: str) -> int:
    """Makes the pictures of a splicer, or what is missing of them."""
    with Interruption(line["quiet"]) as interruption:
        out, made, left = splice(splicer, line, interruption.is_stopping)
    _say(line, f"{made} pictures made, {left} left" + (f"; go on with: {again}" if left else ""))
    print(out, flush=True)
    return interruption.exit_code(0)


def names_of(generator: Generator, order: Order, index: int) -> list[str]:
    """The files of an image, below the output."""
    images, labels = generator.folders
    stem = order.items[index].stem
    return [f"{images}/{stem}.jpg", f"{labels}/{stem}.{generator.suffix}"]


def files_of(
    generator: Generator, order: Order, index: int, pixels: np.ndarray, raw: dict, configs: dict
) -> dict[str, bytes]:
    """The files of an image with their contents."""
    images, labels = generator.folders
    item = order.items[index]
    places = {each.file: place for place, each in enumerate(order.classes, 1)}
    answer = Answer(pixels, raw[generator.task], configs[generator.task], places.get(item.name, 0), order.line["fixed"])
    found = {f"{images}/{item.stem}.jpg": jpeg(pixels)}
    return found | {f"{labels}/{item.stem}.{suffix}": content for suffix, content in generator.write(answer).items()}


def _make_again(arguments: Sequence[str]) -> int:
    """One sample again, as the card and the audit of a run folder say it: --out RUN --only ID."""
    from datasetdm_fast.compat.showlab import generating
    from datasetdm_fast.runs.run_folder.document import described

    values = dict(zip(arguments[::2], arguments[1::2]))
    if set(values) != {"--out", "--only"} or len(arguments) != 4:
        raise Refused(
            f"{PROG}: no script is named first", f"`{PROG} --help` lists them; --out RUN --only ID makes one."
        )
    folder = Path(values["--out"])
    stored = described(folder)
    try:
        documents.check_form(stored.get("line"), {"script": str, "values": dict}, "line")
        script = (GENERATORS | {DEMO.name: DEMO})[stored["line"]["script"]]
    except (ValueError, KeyError) as error:
        raise Refused(
            f"--out {folder}: not a run of this command", "Name the folder .run of an output folder."
        ) from error
    flags = {flag.name: flag.default for flag in script.flags}
    kept = flags | {name: value for name, value in stored["line"]["values"].items() if name in flags}
    plan = planned(script, Line(script.name, kept | {"outdir": str(folder.resolve().parent)}, frozenset()))
    generating.begun(plan.order, plan.folders)
    job = generating.prepare(plan.order, plan.filed, stored)
    written = generating.remake(plan.order, job, values["--only"])
    print(
        f"sample {values['--only']}: made again, {count_noun(len(written), 'file')} of the run folder written",
        file=sys.stderr,
    )
    print(folder, flush=True)
    return 0


def _end(line: Line, out: Path, result) -> int:
    facts = {"number": result.number, "done": result.done, "made": result.made, "set_aside": result.set_aside}
    facts = {"path": str(out), "run": str(result.path), **facts, "complete": result.is_complete}
    print(json.dumps(facts) if line["json"] else out, flush=True)
    result.check()
    return 0


def _say(line: Line, *lines: str) -> None:
    if not line["quiet"]:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
