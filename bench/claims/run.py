"""python -m bench claims: do generated images help a small student, in the shape of the papers' tables?

A student is taught by real demo scenes, by generated ones, and by both, for equally many steps, and scored on unseen rendered scenes.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasetdm_fast.config import setting
from datasetdm_fast.errors import Refused

PROG = "python -m bench claims"
TASKS = ("semantic", "instance", "depth", "pose")


@dataclass(frozen=True)
class ClaimsConfig:
    quick: bool = setting(False, "minutes: fewer seeds, steps, images and test scenes, too few for most claims to hold; nothing goes to bench/results")
    seeds: int = setting(0, "students of each kind, 0 = 3, with --quick 2; at least 2", metavar="N")
    rows: tuple[str, ...] = setting((), "only these claims, comma-separated (default: all)", metavar="LIST")
    out: str = setting("", "folder of generated images, students and the page; the same one again goes on (default: runs/claims)", metavar="DIR")
    json: bool = setting(False, "the rows as one JSON object on stdout")


def main(arguments: Sequence[str]) -> int:
    from bench.run import chosen, prepare
    from datasetdm_fast.flags import parse

    config, _ = parse(arguments, ClaimsConfig, PROG, __doc__)
    if config.seeds and config.seeds < 2:
        raise Refused(f"--seeds {config.seeds}: expected at least 2, as one student has no spread", "ask for 2 or more")
    prepare(threads=1)
    from bench import results
    from bench.claims import page
    from bench.claims.rows import CLAIMS
    from bench.claims.sets import FULL, QUICK

    names = chosen("rows", config.rows, tuple(CLAIMS), tuple(CLAIMS))
    scale = QUICK if config.quick else FULL
    scale = replace(scale, seeds=config.seeds or scale.seeds)
    folder = Path(config.out or f"runs/claims{'-quick' if config.quick else ''}")
    began = time.monotonic()
    bench = Bench(folder, scale, say)
    found = {name: bench.row(name) for name in names}
    document = described(found, scale, [*PROG.split(), *arguments], config.quick, time.monotonic() - began)
    paths = page.write(folder, document, bench)
    is_whole = not config.quick and set(names) == set(CLAIMS)
    for path in [folder / "claims.json", *([results.default_path(document["machine"]).with_suffix(".claims.json")] if is_whole else [])]:
        results.ResultFile(path, document).save()
        paths.append(path)
    for path in paths:
        say(str(path))
    print(json.dumps(found | {name: document[name] for name in ("machine", "scale", "command", "seconds")}) if config.json else page.terminal(document))
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def described(rows: dict[str, Any], scale, command: Sequence[str], is_quick: bool, seconds: float) -> dict[str, Any]:
    import torch

    from bench import machine, results

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


class Bench:
    """The sets, labellers and exams of every row, made when a row first asks for them."""

    def __init__(self, folder: Path, scale, say: Callable[[str], None]):
        from bench.claims import sets
        from bench.claims.exam import Record
        from datasetdm_fast.student import Course
        from datasetdm_fast.student_data import SIDE, vocabulary_of

        self.folder, self.scale, self.say = folder, scale, say
        self.record = Record(folder / "students", say)
        self.course = Course(steps=scale.steps)
        self.side = SIDE
        self.vocabulary = vocabulary_of(sets.scenes(sets.LABELLED, 1, SIDE))
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def row(self, name: str) -> dict[str, Any]:
        from bench.claims.rows import CLAIMS, row_of

        make = {"instance": self._instance, "zero-shot": self._zero_shot, "domain": self._domain, "parity": self._parity}.get(name)
        scores, facts = make() if make else self._main(name)
        row = row_of(CLAIMS[name], scores, facts)
        if broken := [cell for cell in row.get("cells", ()) if not cell["holds"]]:
            row["holds"] = False
            row["reason"] = "; ".join(f"{cell['student']} student, {cell['real_scenes']} real: {cell['reason']}" for cell in broken)
        self.say(f"{name}: real {row['real']:.4g}, both {row['both']:.4g}, sigma {row['sigma']:.2g}: {'holds' if row['holds'] else 'does not hold'}")
        return row

    def real(self, count: int, fits: str = "is_any"):
        """Labelled scenes: the same that taught the labeller of the row."""
        from bench.claims import sets
        from datasetdm_fast import student_data

        def make():
            source = sets.scenes(sets.LABELLED, count, self.side, getattr(sets, fits))
            return student_data.real(source, source, self.vocabulary).balanced()

        return self.once(f"real {fits} {count}", make)

    def generated(self, engine: str, count: int):
        """Images of the pool with the labels that the run folder gives them."""
        from bench.claims import sets
        from datasetdm_fast import student_data

        def make():
            run = sets.pool(self.folder / ("pool" if engine == "fast" else f"pool-{engine}"), count, engine, self.say)
            return student_data.synthetic((run[k] for k in range(count)), self.vocabulary, student_data.Trust())

        path = self.folder / "sets" / f"{engine}-{count}.pt"
        return self.once(path.name, lambda: sets.kept(path, self.vocabulary, make).balanced())

    def relabelled(self, name: str, fits: str, rename: str, wanted: Callable[[Any], bool]):
        """Images of the pool with labels of a labeller that was taught by the row's own scenes alone."""
        from bench.claims import sets
        from datasetdm_fast import student_data

        def make():
            run = sets.pool(self.folder / "pool", self.scale.synthetic, "fast", self.say)
            positions = [k for k in range(self.scale.synthetic) if wanted(run[k])]
            taught = sets.scenes(sets.LABELLED, self.scale.real, sets.MODEL_SIDE, getattr(sets, fits))
            self.say(f"{name}: teaching a labeller with {self.scale.real} scenes for {len(positions)} images")
            decoder = sets.labeller(taught, self.scale, self.folder / "captures")
            samples = sets.retold(run, positions, decoder, getattr(sets, rename))
            return student_data.synthetic(samples, self.vocabulary, student_data.Trust())

        path = self.folder / "sets" / f"{name}-{self.scale.synthetic}-{self.scale.labeller_steps}.pt"
        return self.once(path.name, lambda: sets.kept(path, self.vocabulary, make).balanced())

    def exam(self, name: str = "everything", fits: str = "is_any"):
        from bench.claims import sets
        from bench.claims.exam import Exam

        return self.once(f"exam {name}", lambda: Exam.of(name, sets.scenes(sets.TEST, self.scale.test, self.side, getattr(sets, fits))))

    def scores(self, arms: dict[str, tuple], exam, tasks: Sequence[str], pick: Callable[[dict], float], **course: Any) -> dict[str, list[float]]:
        """{arm: figure of every seed}."""
        made = self.arms(arms, tasks, **course)
        return {name: [pick(self.record.figures(arm, seed, exam)) for seed in range(self.scale.seeds)] for name, arm in made.items()}

    def arms(self, arms: dict[str, tuple], tasks: Sequence[str], **course: Any) -> dict[str, Any]:
        from bench.claims.exam import Arm

        return {name: Arm(name, found, replace(self.course, **course), tuple(tasks)) for name, found in arms.items()}

    def three(self, real, synthetic) -> dict[str, tuple]:
        return {"real": (real,), "synthetic": (synthetic,), "both": (real, synthetic)}

    def main_arms(self, count: int = 0) -> dict[str, tuple]:
        return self.three(self.real(count or self.scale.real), self.generated("fast", self.scale.synthetic))

    def _main(self, name: str) -> tuple[dict, dict]:
        """Rows that read different figures of the same students."""
        from bench.claims.sets import RARE

        pick, count = {
            "semantic": (lambda found: 100 * found["semantic"]["miou"], self.scale.real),
            "depth": (lambda found: found["depth"]["absrel"], self.scale.fewer),
            "pose": (lambda found: 100 * found["pose"]["oks_ap"], self.scale.fewer),
            "long-tail": (lambda found: over(found, RARE), self.scale.real),
        }[name]
        arms = self.main_arms(count)
        facts = self.facts(arms) | ({"classes": list(RARE)} if name == "long-tail" else {})
        return self.scores(arms, self.exam(), TASKS, pick), facts | self.ceiling(pick)

    def ceiling(self, pick: Callable[[dict], float], **course: Any) -> dict[str, float]:
        """The figure of one student taught by as many real scenes as there are generated images: about the most that data can bring it to."""
        from bench.claims.exam import Arm

        many = Arm("many real", (self.real(self.scale.synthetic),), replace(self.course, **course), TASKS)
        return {"ceiling": pick(self.record.figures(many, 0, self.exam())), "ceiling_scenes": self.scale.synthetic}

    def _instance(self) -> tuple[dict, dict]:
        """Two numbers of real scenes and two sizes of student; the row is the first of the four, and holds where all four do."""
        from bench.claims.rows import CLAIMS, row_of

        synthetic, cells = self.generated("fast", self.scale.synthetic), []

        def pick(found: dict) -> float:
            return 100 * found["instance"]["ap"]

        for size, steps in (("small", self.scale.steps), ("large", self.scale.steps // 2)):  # a step of the large one costs twice as much
            for count in (self.scale.real, self.scale.fewer):
                arms = self.three(self.real(count), synthetic)
                scores = self.scores(arms, self.exam(), TASKS, pick, size=size, steps=steps)
                cell = {"student": size, "real_scenes": count, **self.facts(arms), "steps": steps}
                cells.append(row_of(CLAIMS["instance"], scores, cell | self.ceiling(pick, size=size, steps=steps)))
        return cells[0]["seeds"], self.facts(self.main_arms()) | {"cells": cells}

    def _zero_shot(self) -> tuple[dict, dict]:
        from bench.claims.sets import SEEN, UNSEEN, names_one

        arms = self.three(self.real(self.scale.real, "is_seen"), self.relabelled("zero-shot", "is_seen", "by_its_prompt", names_one))
        exam, tasks = self.exam(), ("semantic",)
        picks = {"seen": lambda found: over(found, SEEN), "unseen": lambda found: over(found, UNSEEN), "both": lambda found: harmonic(found, SEEN, UNSEEN)}
        scores = {name: self.scores(arms, exam, tasks, pick) for name, pick in picks.items()}
        return scores["both"], self.facts(arms) | {"classes": list(UNSEEN)} | {name: scores[name]["both"] for name in ("seen", "unseen")}

    def _domain(self) -> tuple[dict, dict]:
        from bench.claims.sets import says_elsewhere

        arms = self.three(self.real(self.scale.real, "is_day"), self.relabelled("domain", "is_day", "as_it_is", says_elsewhere))
        exam, steps = self.exam("elsewhere", "is_elsewhere"), self.scale.steps // 2
        scores = self.scores(arms, exam, ("semantic",), lambda found: 100 * found["semantic"]["miou"], steps=steps)
        return scores, self.facts(arms) | {"steps": steps}

    def _parity(self) -> tuple[dict, dict]:
        """The same prompts and seeds through both engines: here `real` is the oracle's set and `both` that of the fast engine."""
        arms = {"real": (self.generated("torch", self.scale.parity),), "both": (self.generated("fast", self.scale.parity),)}
        steps = self.scale.steps // 4  # there are few images
        scores = self.scores(arms, self.exam(), TASKS, lambda found: 100 * found["semantic"]["miou"], steps=steps)
        return scores, {"steps": steps, "images": {"torch": len(arms["real"][0]), "fast": len(arms["both"][0])}}

    def facts(self, arms: dict[str, tuple]) -> dict[str, Any]:
        """How many different images each side has."""
        real, synthetic = arms["both"]
        return {"steps": self.scale.steps, "images": {"real": len(real), "synthetic": len(synthetic), "left_out": synthetic.left_out}}
