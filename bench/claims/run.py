"""python -m bench claims: do generated images help a small student, in the shape of the papers' tables?

A student is taught by real demo scenes, by generated ones, and by both, for equally many steps, and scored on unseen
rendered scenes.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasetdm_fast.config import setting
from datasetdm_fast.errors import Refused

PROG = "python -m bench claims"
TASKS = ("semantic", "instance", "depth", "pose")
MASKS = ("semantic", "instance")
MOST_PROCESSES = 8


@dataclass(frozen=True)
class ClaimsConfig:
    quick: bool = setting(
        False,
        "minutes: fewer seeds, steps, images and test scenes, too few for every claim to hold; nothing goes to "
        "bench/results",
    )
    seeds: int = setting(0, "students of each kind, 0 = 3, with --quick 2; at least 2", metavar="N")
    rows: tuple[str, ...] = setting((), "only these claims, comma-separated (default: all)", metavar="LIST")
    out: str = setting(
        "",
        "folder of generated images, students and the page; the same one again goes on (default: runs/claims)",
        metavar="DIR",
    )
    json: bool = setting(False, "the rows as one JSON object on stdout")


def main(arguments: Sequence[str]) -> int:
    from bench.options import chosen, prepare
    from datasetdm_fast.command_line.flags import parse

    config, _ = parse(arguments, ClaimsConfig, PROG, __doc__)
    if config.seeds and config.seeds < 2:
        raise Refused(f"--seeds {config.seeds}: expected at least 2, as one student has no spread", "ask for 2 or more")
    prepare(threads=1)
    from bench.claims import page
    from bench.claims.rows import CLAIMS
    from bench.claims.sets import FULL, QUICK
    from bench.report import results

    names = chosen("rows", config.rows, tuple(CLAIMS), tuple(CLAIMS))
    scale = QUICK if config.quick else FULL
    scale = replace(scale, seeds=config.seeds or scale.seeds)
    folder = Path(config.out or f"runs/claims{'-quick' if config.quick else ''}")
    began = time.monotonic()
    with Bench(folder, scale, say) as bench:
        for name in names:
            bench.foresee(name)
        plans = {name: bench.plan(name) for name in names}
        found = {name: bench.row(name, plan) for name, plan in plans.items()}
        document = described(found, scale, [*PROG.split(), *arguments], config.quick, time.monotonic() - began)
        paths = page.write(folder, document, bench)
    is_whole = not config.quick and set(names) == set(CLAIMS)
    for path in [
        folder / "claims.json",
        *([results.default_path(document["machine"]).with_suffix(".claims.json")] if is_whole else []),
    ]:
        results.ResultFile(path, document).save()
        paths.append(path)
    for path in paths:
        say(str(path))
    print(
        json.dumps(found | {name: document[name] for name in ("machine", "scale", "command", "seconds")})
        if config.json
        else page.terminal(document)
    )
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def described(rows: dict[str, Any], scale, command: Sequence[str], is_quick: bool, seconds: float) -> dict[str, Any]:
    import torch

    from bench.machine import machine
    from bench.report import results

    setting = {"model": "demo", "quick": is_quick, **asdict(scale)}
    head = {"format": results.FORMAT, "suite": "claims", "date": results.now(), "command": shlex.join(command)}
    return head | {
        "machine": machine.describe(torch.device("cpu")),
        "setting": setting,
        "scale": setting,
        "seconds": round(seconds, 1),
        "rows": rows,
        "parts": {},
    }


def over(found: dict, names: Sequence[str]) -> float:
    """Mean IoU of some classes in points."""
    return 100 * sum(found["semantic"]["per_class"][name] for name in names) / len(names)


def harmonic(found: dict, seen: Sequence[str], unseen: Sequence[str]) -> float:
    """Harmonic mean of what classes with and without labelled scenes score."""
    first, second = over(found, seen), over(found, unseen)
    return 2 * first * second / (first + second) if first + second else 0.0


Scores = dict[str, list[float]]
Plan = Callable[
    [], tuple[Scores, dict[str, Any]]
]  # waits for students; the figures of each arm's seeds, and what else a row says


class Bench:
    """The sets, labellers and exams of every row, made when a row first asks for them, while students learn in
    processes beside this one.
    """

    def __init__(self, folder: Path, scale, say: Callable[[str], None]):
        from bench.claims import sets
        from bench.claims.exam import Record
        from datasetdm_fast.evaluation.student import StudentSchedule
        from datasetdm_fast.evaluation.student_data import SIDE, vocabulary_of
        from datasetdm_fast.workers.devices import cores

        self.folder, self.scale, self.say = folder, scale, say
        self.record = Record(folder / "students", say, min(cores(), MOST_PROCESSES))
        self.course = StudentSchedule(steps=scale.steps)
        self.side = SIDE
        self.vocabulary = vocabulary_of(sets.scenes(sets.LABELLED, 1, SIDE))
        self._made: dict[str, Any] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: Any) -> None:
        self.record.close(is_waiting=error[0] is None)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def foresee(self, name: str) -> None:
        """Has the labellers of a row taught, so that nobody waits for them later."""
        for fits, count, tasks in self.needs(name):
            self.labeller(fits, count, tasks)

    def needs(self, name: str) -> list[tuple[str, int, Sequence[str]]]:
        """Labellers taught by a row's own scenes; the others are those shipped, taught by the scenes from `LABELLED`
        on.
        """
        scale = self.scale
        own = {"zero-shot": ("is_seen", scale.real, ("semantic",)), "domain": ("is_day", scale.real, ("semantic",))}
        if name in own:
            return [own[name]]
        return [
            ("is_any", count, self.tasks_of(count))
            for count in {"instance": scale.fewer, "depth": scale.fewer[:1], "pose": scale.fewer[:1]}.get(name, ())
        ]

    def tasks_of(self, count: int) -> Sequence[str]:
        """What labellers taught by so many scenes tell: everything, or masks where no row asks for more."""
        return TASKS if count == self.scale.fewer[0] else MASKS

    def labeller(self, fits: str, count: int, tasks: Sequence[str]) -> Callable[[], Path]:
        """Has decoders taught by some scenes alone; what it returns waits for them and names their folder."""
        from bench.claims import sets

        def make() -> Callable[[], Path]:
            folder = (
                self.folder / "labellers" / f"{fits}-{count}-{self.scale.labeller_steps}-{self.scale.labeller_draws}"
            )
            source = sets.scenes(sets.LABELLED, count, sets.MODEL_SIDE, getattr(sets, fits))
            self.say(f"{folder}: teaching a labeller with {count} scenes for {', '.join(tasks)}")
            futures = [
                self.record.submit(sets.labeller, source, task, self.scale, self.folder / "captures", folder / task)
                for task in tasks
            ]
            return lambda: [future.result() for future in futures] and folder

        return self.once(f"labeller {fits} {count}", make)

    def plan(self, name: str) -> Plan:
        """Has all students of a row taught."""
        make = {
            "instance": self._instance,
            "zero-shot": self._zero_shot,
            "domain": self._domain,
            "parity": self._parity,
        }.get(name)
        return make() if make else self._main(name)

    def row(self, name: str, plan: Plan) -> dict[str, Any]:
        from bench.claims.rows import CLAIMS, row_of

        row = row_of(CLAIMS[name], *plan())
        if broken := [cell for cell in row.get("cells", ()) if not cell["holds"]]:
            row["holds"] = False
            row["reason"] = "; ".join(
                f"{cell['student']} student, {cell['real_scenes']} real: {cell['reason']}" for cell in broken
            )
        self.say(
            f"{name}: real {row['real']:.4g}, both {row['both']:.4g}, sigma {row['sigma']:.2g}: "
            f"{'holds' if row['holds'] else 'does not hold'}"
        )
        return row

    def real(self, count: int, fits: str = "is_any"):
        """Labelled scenes: the same that taught the labeller of the row."""
        from bench.claims import sets
        from datasetdm_fast.evaluation import student_data

        def make():
            source = sets.scenes(sets.LABELLED, count, self.side, getattr(sets, fits))
            return student_data.real(source, source, self.vocabulary).balanced()

        return self.once(f"real {fits} {count}", make)

    def generated(self, engine: str, count: int):
        """Images of the pool with the labels that the run folder gives them."""

        def make(run) -> Iterator[Any]:
            return (run[k] for k in range(count))

        return self.told(engine, count, f"{engine}-{count}", make)

    def relabelled(self, fits: str, count: int, tasks: Sequence[str], rename: str = "as_it_is", wanted: str = "is_any"):
        """Images of the pool with labels of labellers that were taught by the row's own scenes alone."""
        from bench.claims import sets

        def make(run) -> Iterator[Any]:
            positions = [k for k in range(self.scale.synthetic) if getattr(sets, wanted)(run[k])]
            decoders = self.labeller(fits, count, tasks)()
            self.say(f"{decoders}: labelling {len(positions)} images")
            return sets.retold(run, positions, decoders, getattr(sets, rename))

        scale = self.scale
        return self.told(
            "fast",
            scale.synthetic,
            f"{fits}-{count}-{wanted}-{scale.synthetic}-{scale.labeller_steps}-{scale.labeller_draws}",
            make,
        )

    def told(self, engine: str, count: int, name: str, make: Callable[[Any], Iterator[Any]]):
        """Lessons from the first images of an engine's pool; those made from the same pool before are found again."""
        from bench.claims import sets
        from datasetdm_fast.evaluation import student_data

        def found():
            run = sets.pool(self.folder / ("pool" if engine == "fast" else f"pool-{engine}"), count, engine, self.say)
            made_by = json.dumps(
                [run.document[part] for part in ("config", "model", "decoders", "engine")], sort_keys=True
            )
            path = self.folder / "sets" / f"{name}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}.pt"
            return sets.kept(
                path, self.vocabulary, lambda: student_data.synthetic(make(run), self.vocabulary, student_data.Trust())
            ).balanced()

        return self.once(f"{engine} {name}", found)

    def exam(self, name: str = "everything", fits: str = "is_any"):
        from bench.claims import sets
        from bench.claims.exam import Exam

        return self.once(
            f"exam {name}", lambda: Exam(name, sets.scenes(sets.TEST, self.scale.test, self.side, getattr(sets, fits)))
        )

    def three(self, real: Callable[[], Any], synthetic: Callable[[], Any]) -> dict[str, Callable[[], tuple]]:
        """The sets of each arm, made when they are called for."""
        return {"real": lambda: (real(),), "synthetic": lambda: (synthetic(),), "both": lambda: (real(), synthetic())}

    def main_arms(self, count: int = 0) -> dict[str, Callable[[], tuple]]:
        """Real scenes and the pool, labelled by a labeller that was taught by the same scenes: the shipped one where
        there are as many as taught it.
        """
        if count in (0, self.scale.real):
            return self.three(lambda: self.real(self.scale.real), lambda: self.generated("fast", self.scale.synthetic))
        return self.three(lambda: self.real(count), lambda: self.relabelled("is_any", count, self.tasks_of(count)))

    def arm(self, name: str, sets: tuple, tasks: Sequence[str] = TASKS, **course: Any):
        from bench.claims.exam import Arm

        return Arm(name, sets, replace(self.course, **course), tuple(tasks))

    def scores(
        self, arms: dict[str, Callable[[], tuple]], exam, tasks: Sequence[str] = TASKS, **course: Any
    ) -> Callable[[Callable[[dict], float]], Scores]:
        """Has students of every arm and seed taught; what it returns waits for them and picks a figure of each."""
        made = {}
        for name, sets in arms.items():
            made[name] = self.arm(name, sets(), tasks, **course)
            for seed in range(self.scale.seeds):
                self.record.ask(made[name], seed, exam)
        return lambda pick: {
            name: [pick(self.record.figures(arm, seed, exam)) for seed in range(self.scale.seeds)]
            for name, arm in made.items()
        }

    def ceiling(self, **course: Any) -> Callable[[Callable[[dict], float]], dict[str, float]]:
        """The figure of one student taught by as many real scenes as there are generated images: about the most that
        data can bring it to.
        """
        arm, exam = self.arm("many real", (self.real(self.scale.synthetic),), **course), self.exam()
        self.record.ask(arm, 0, exam)
        return lambda pick: {"ceiling": pick(self.record.figures(arm, 0, exam)), "ceiling_scenes": self.scale.synthetic}

    def _main(self, name: str) -> Plan:
        """Rows that read different figures of the same students."""
        from bench.claims.sets import RARE

        pick, count = {
            "semantic": (lambda found: 100 * found["semantic"]["miou"], self.scale.real),
            "depth": (lambda found: found["depth"]["absrel"], self.scale.fewer[0]),
            "pose": (lambda found: 100 * found["pose"]["oks_ap"], self.scale.fewer[0]),
            "long-tail": (lambda found: over(found, RARE), self.scale.real),
        }[name]
        arms, steps = self.main_arms(count), self.steps_of(count)
        scores, most = self.scores(arms, self.exam(), steps=steps), self.ceiling(steps=steps)
        classes = {"classes": list(RARE)} if name == "long-tail" else {}
        return lambda: (scores(pick), self.facts(arms, steps) | classes | most(pick))

    def _instance(self) -> Plan:
        """Two numbers of real scenes and two sizes of student; the row is the first of them, and holds where all do."""
        from bench.claims.rows import CLAIMS, row_of

        def pick(found: dict) -> float:
            return 100 * found["instance"]["ap"]

        planned = []
        for size in self.scale.sizes:
            for count in self.scale.fewer:
                arms, steps = self.main_arms(count), self.steps_of(count)
                cell = {"student": size, "real_scenes": count, **self.facts(arms, steps)}
                planned.append(
                    (cell, self.scores(arms, self.exam(), size=size, steps=steps), self.ceiling(size=size, steps=steps))
                )

        def found() -> tuple[Scores, dict[str, Any]]:
            cells = [row_of(CLAIMS["instance"], scores(pick), cell | most(pick)) for cell, scores, most in planned]
            return cells[0]["seeds"], {name: cells[0][name] for name in ("steps", "images")} | {"cells": cells}

        return found

    def _zero_shot(self) -> Plan:
        from bench.claims.sets import SEEN, UNSEEN

        real = self.scale.real
        arms = self.three(
            lambda: self.real(real, "is_seen"),
            lambda: self.relabelled("is_seen", real, ("semantic",), "by_its_prompt", "names_one"),
        )
        steps = self.scale.short
        scores = self.scores(arms, self.exam(), ("semantic",), steps=steps)
        parts = {"seen": lambda found: over(found, SEEN), "unseen": lambda found: over(found, UNSEEN)}
        return lambda: (
            scores(lambda found: harmonic(found, SEEN, UNSEEN)),
            self.facts(arms, steps)
            | {"classes": list(UNSEEN)}
            | {name: scores(pick)["both"] for name, pick in parts.items()},
        )

    def _domain(self) -> Plan:
        real = self.scale.real
        arms = self.three(
            lambda: self.real(real, "is_day"),
            lambda: self.relabelled("is_day", real, ("semantic",), wanted="says_elsewhere"),
        )
        exam, steps = self.exam("elsewhere", "is_elsewhere"), self.scale.steps // 2
        scores = self.scores(arms, exam, ("semantic",), steps=steps)
        return lambda: (scores(lambda found: 100 * found["semantic"]["miou"]), self.facts(arms, steps))

    def _parity(self) -> Plan:
        """The same prompts and seeds through both engines: here `real` is the oracle's set and `both` that of the fast
        engine.
        """
        arms = {
            "real": lambda: (self.generated("torch", self.scale.parity),),
            "both": lambda: (self.generated("fast", self.scale.parity),),
        }
        steps = self.scale.steps // 4  # there are few images
        scores = self.scores(arms, self.exam(), steps=steps)
        images = {"torch": arms["real"], "fast": arms["both"]}
        return lambda: (
            scores(lambda found: 100 * found["semantic"]["miou"]),
            {"steps": steps, "images": {name: len(sets()[0]) for name, sets in images.items()}},
        )

    def steps_of(self, count: int) -> int:
        """Of a student in the rows with so many real scenes."""
        return self.scale.steps if count == self.scale.real else self.scale.short

    def facts(self, arms: dict[str, Callable[[], tuple]], steps: int) -> dict[str, Any]:
        """How many different images each side has."""
        real, synthetic = arms["both"]()
        return {
            "steps": steps,
            "images": {"real": len(real), "synthetic": len(synthetic), "left_out": synthetic.left_out},
        }
