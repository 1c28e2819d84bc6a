"""The experiment of each claim: its sets, labellers, students and test scenes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from bench.proof.claims import sets
from bench.proof.claims.rows import CLAIMS, row_of
from bench.proof.claims.students import Arm, Figures, StudentStore, TestSet
from bench.proof.students import student_data
from bench.proof.students.student import StudentSchedule
from bench.proof.students.student_data import SIDE, StudentData
from datasetdm_fast.cores import count_cores
from datasetdm_fast.runs.run_folder.reader import Run

TASKS = ("semantic", "instance", "depth", "pose")
MASKS = ("semantic", "instance")
SEMANTIC = ("semantic",)
MOST_PROCESSES = 8

Sets = Callable[[], tuple[StudentData, ...]]  # makes the sets of an arm
Pick = Callable[[Figures], float]
Scores = dict[str, list[float]]  # arm -> the figure of each seed
Facts = dict[str, Any]
Experiment = Callable[[], tuple[Scores, Facts]]  # waits for the students


def miou_over(found: Figures, names: Sequence[str]) -> float:
    """Mean IoU of some classes in points."""
    return 100 * sum(found["semantic"]["per_class"][name] for name in names) / len(names)


def points(task: str, figure: str) -> Pick:
    return lambda found: 100 * found[task][figure]


class Experiments:
    """The sets, labellers and test scenes of every row, made when a row first asks for them, while students are trained
    in processes beside this one.
    """

    def __init__(self, folder: Path, scale: sets.Scale, say: Callable[[str], None], processes: int = 0):
        self.folder, self.scale, self.say = folder, scale, say
        self.processes = processes or min(count_cores(), MOST_PROCESSES)
        self.store = StudentStore(folder / "students", say, self.processes)
        self.schedule = StudentSchedule(steps=scale.steps)
        self.vocabulary = student_data.vocabulary_of(sets.scenes(sets.LABELLED, 1, SIDE))
        self._made: dict[str, Any] = {}
        picks = {
            "semantic": (points("semantic", "miou"), scale.real),
            "depth": (lambda found: found["depth"]["absrel"], scale.fewer[0]),
            "pose": (points("pose", "oks_ap"), scale.fewer[0]),
            "long-tail": (lambda found: miou_over(found, sets.RARE), scale.real),
        }
        self.experiments: dict[str, Callable[[], Experiment]] = {
            **{name: lambda name=name, pick=pick: self._main(name, *pick) for name, pick in picks.items()},
            "instance": self._instance,
            "zero-shot": self._zero_shot,
            "domain": self._domain,
            "parity": self._parity,
        }

    def __enter__(self) -> Experiments:
        return self

    def __exit__(self, *error: Any) -> None:
        self.store.close(is_waiting=error[0] is None)

    def rows(self, names: Sequence[str]) -> dict[str, Facts]:
        """The rows of some claims; all labellers are started first, then all students, then each row is waited for."""
        for name in names:
            self.start_labellers(name)
        started = {name: self.experiments[name]() for name in names}
        return {name: self.row(name, experiment) for name, experiment in started.items()}

    def row(self, name: str, experiment: Experiment) -> Facts:
        row = row_of(CLAIMS[name], *experiment())
        if failed := [cell for cell in row.get("cells", ()) if not cell["holds"]]:
            reasons = [f"{cell['student']} student, {cell['real_scenes']} real: {cell['reason']}" for cell in failed]
            row |= {"holds": False, "reason": "; ".join(reasons)}
        verdict = "holds" if row["holds"] else "does not hold"
        self.say(f"{name}: real {row['real']:.4g}, both {row['both']:.4g}, sigma {row['sigma']:.2g}: {verdict}")
        return row

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    # Labellers and sets -----------------------------------------------------------------------------------------------
    def start_labellers(self, name: str) -> None:
        """Starts training the labellers that know a row's own scenes alone; other rows use those shipped, trained on
        the scenes from `LABELLED` on.
        """
        scale = self.scale
        if fits := {"zero-shot": "is_seen", "domain": "is_day"}.get(name):
            self.labeller(fits, scale.real, SEMANTIC)
        for count in {"instance": scale.fewer, "depth": scale.fewer[:1], "pose": scale.fewer[:1]}.get(name, ()):
            self.labeller("is_any", count, self.tasks_of(count))

    def tasks_of(self, count: int) -> Sequence[str]:
        """The tasks of labellers trained on so many scenes: all, or masks where no row asks for more."""
        return TASKS if count == self.scale.fewer[0] else MASKS

    def labeller(self, fits: str, count: int, tasks: Sequence[str]) -> Callable[[], Path]:
        """Starts training decoders on some scenes alone; what it returns waits for them and names their folder."""
        scale = self.scale

        def make() -> Callable[[], Path]:
            folder = self.folder / "labellers" / f"{fits}-{count}-{scale.labeller_steps}-{scale.labeller_draws}"
            source = sets.scenes(sets.LABELLED, count, sets.MODEL_SIDE, getattr(sets, fits))
            self.say(f"{folder}: training a labeller on {count} scenes for {', '.join(tasks)}")
            given = [(source, task, scale, self.folder / "captures", folder / task) for task in tasks]
            futures = [self.store.submit(sets.train_labeller, *one) for one in given]
            return lambda: [future.result() for future in futures] and folder

        return self.once(f"labeller {fits} {count}", make)

    def real(self, count: int, fits: str = "is_any") -> StudentData:
        """Labelled scenes: the same that the labeller of the row was trained on."""

        def make() -> StudentData:
            source = sets.scenes(sets.LABELLED, count, SIDE, getattr(sets, fits))
            return student_data.real(source, source, self.vocabulary).balanced()

        return self.once(f"real {fits} {count}", make)

    def generated(self, engine: str, count: int) -> StudentData:
        """Images of the pool with the labels that the run folder gives them."""
        return self.from_pool(engine, count, f"{engine}-{count}", lambda run: (run[k] for k in range(count)))

    def relabelled(
        self, fits: str, count: int, tasks: Sequence[str], rename: str = "unchanged", wanted: str = "is_any"
    ) -> StudentData:
        """Images of the pool with labels of labellers that were trained on the row's own scenes alone."""
        scale = self.scale

        def samples(run: Run) -> Iterator[sets.RelabelledSample]:
            positions = [k for k in range(scale.synthetic) if getattr(sets, wanted)(run[k])]
            decoders = self.labeller(fits, count, tasks)()
            self.say(f"{decoders}: labelling {len(positions)} images")
            return sets.relabelled(run, positions, decoders, getattr(sets, rename))

        name = f"{fits}-{count}-{wanted}-{scale.synthetic}-{scale.labeller_steps}-{scale.labeller_draws}"
        return self.from_pool("fast", scale.synthetic, name, samples)

    def varied(self, fits: str, count: int) -> StudentData:
        """Variants of day images, with the labels that the row's labeller read from the day images."""
        scale, place = self.scale, self.scale.place(self.folder)

        def synthetic() -> StudentData:
            seed = scale.first(sets.POOL_SEED)
            day, variants = sets.day_and_variants(place / "domains", scale.varied, seed, self.say)
            decoders = self.labeller(fits, count, SEMANTIC)()
            labelled = sets.relabelled(day, range(len(day)), decoders, sets.unchanged)
            return student_data.synthetic(sets.moved(labelled, variants), self.vocabulary)

        name = f"varied-{fits}-{count}-{scale.varied}-{scale.labeller_steps}-{scale.labeller_draws}"
        path = place / "sets" / f"{name}.pt"
        return self.once(name, lambda: sets.stored(path, self.vocabulary, synthetic).balanced())

    def from_pool(
        self, engine: str, count: int, name: str, samples: Callable[[Run], Iterator[sets.Pictured]]
    ) -> StudentData:
        """A set made of the first images of an engine's pool, stored for the next run over the same pool."""

        def synthetic(run: Run) -> StudentData:
            return student_data.synthetic(samples(run), self.vocabulary)

        def make() -> StudentData:
            place, seed = self.scale.place(self.folder), self.scale.first(sets.POOL_SEED)
            run = sets.pool(place / ("pool" if engine == "fast" else f"pool-{engine}"), count, seed, engine, self.say)
            made_by = [run.document[part] for part in ("config", "model", "decoders", "engine")]
            digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]
            path = place / "sets" / f"{name}-{digest}.pt"
            return sets.stored(path, self.vocabulary, lambda: synthetic(run)).balanced()

        return self.once(f"{engine} {name}", make)

    def test_set(self, name: str = "everything", fits: str = "is_any") -> TestSet:
        def make() -> TestSet:
            return TestSet(name, sets.scenes(self.scale.first(sets.TEST), self.scale.test, SIDE, getattr(sets, fits)))

        return self.once(f"test {name}", make)

    # Students ---------------------------------------------------------------------------------------------------------
    def arms(self, count: int = 0) -> dict[str, Sets]:
        """Real scenes and the pool, labelled by a labeller that was trained on the same scenes: the shipped one where
        there are as many as it was trained on.
        """
        if count in (0, self.scale.real):
            return three(lambda: self.real(self.scale.real), lambda: self.generated("fast", self.scale.synthetic))
        return three(lambda: self.real(count), lambda: self.relabelled("is_any", count, self.tasks_of(count)))

    def arm(self, name: str, data: tuple[StudentData, ...], tasks: Sequence[str] = TASKS, **schedule: Any) -> Arm:
        return Arm(name, data, replace(self.schedule, **schedule), tuple(tasks))

    def scores(
        self, arms: dict[str, Sets], test: TestSet, tasks: Sequence[str] = TASKS, **schedule: Any
    ) -> Callable[[Pick], Scores]:
        """Starts training students of every arm and seed; what it returns waits for them and picks a figure of each."""
        started, seeds = {}, self.scale.students
        for name, data in arms.items():
            started[name] = self.arm(name, data(), tasks, **schedule)
            for seed in seeds:
                self.store.start(started[name], seed, test)
        return lambda pick: {
            name: [pick(self.store.figures(arm, seed, test)) for seed in seeds] for name, arm in started.items()
        }

    def ceiling(self, **schedule: Any) -> Callable[[Pick], Facts]:
        """The figure of one student trained on as many real scenes as there are generated images: about the most that
        data can bring it to.
        """
        count, test = self.scale.synthetic, self.test_set()
        arm = self.arm("many real", (self.real(count),), **schedule)
        seed = self.scale.students[0]
        self.store.start(arm, seed, test)
        return lambda pick: {"ceiling": pick(self.store.figures(arm, seed, test)), "ceiling_scenes": count}

    # Rows -------------------------------------------------------------------------------------------------------------
    def _main(self, name: str, pick: Pick, count: int) -> Experiment:
        """Rows that read different figures of the same students."""
        arms, steps = self.arms(count), self.steps_of(count)
        scores, most = self.scores(arms, self.test_set(), steps=steps), self.ceiling(steps=steps)
        classes = {"classes": list(sets.RARE)} if name == "long-tail" else {}
        return lambda: (scores(pick), self.facts(arms, steps) | classes | most(pick))

    def _instance(self) -> Experiment:
        """Two numbers of real scenes and two sizes of student; the row is the first of them, and holds where all do."""
        pick, started = points("instance", "ap"), []
        for size in self.scale.sizes:
            for count in self.scale.fewer:
                arms, steps = self.arms(count), self.steps_of(count)
                cell = {"student": size, "real_scenes": count, **self.facts(arms, steps)}
                scores = self.scores(arms, self.test_set(), size=size, steps=steps)
                started.append((cell, scores, self.ceiling(size=size, steps=steps)))

        def found() -> tuple[Scores, Facts]:
            cells = [row_of(CLAIMS["instance"], scores(pick), cell | most(pick)) for cell, scores, most in started]
            return cells[0]["seeds"], {name: cells[0][name] for name in ("steps", "images")} | {"cells": cells}

        return found

    def _zero_shot(self) -> Experiment:
        real, steps = self.scale.real, self.scale.short
        arms = three(
            lambda: self.real(real, "is_seen"),
            lambda: self.relabelled("is_seen", real, SEMANTIC, "by_its_prompt", "names_one"),
        )
        scores = self.scores(arms, self.test_set(), SEMANTIC, steps=steps)

        def found() -> tuple[Scores, Facts]:
            seen, unseen = (scores(lambda one, n=names: miou_over(one, n)) for names in (sets.SEEN, sets.UNSEEN))
            means = {name: list(map(harmonic_mean, zip(seen[name], unseen[name]))) for name in seen}
            both = {"classes": list(sets.UNSEEN), "seen": seen["both"], "unseen": unseen["both"]}
            return means, self.facts(arms, steps) | both

        return found

    def _domain(self) -> Experiment:
        real, steps = self.scale.real, self.scale.steps // 2
        arms = three(
            lambda: self.real(real, "is_day"),
            lambda: self.relabelled("is_day", real, SEMANTIC, wanted="says_elsewhere"),
        )
        if self.scale.varied:
            arms["variants"] = lambda: (self.real(real, "is_day"), self.varied("is_day", real))
        scores = self.scores(arms, self.test_set("elsewhere", "is_elsewhere"), SEMANTIC, steps=steps)

        def found() -> tuple[Scores, Facts]:
            figures, facts = scores(points("semantic", "miou")), self.facts(arms, steps)
            if self.scale.varied:
                images = facts["images"] | {"synthetic": len(arms["variants"]()[1])}
                other = {"real": figures["real"], "both": figures.pop("variants")}
                facts["variants"] = row_of(CLAIMS["domain"], other, {"steps": steps, "images": images})
            return figures, facts

        return found

    def _parity(self) -> Experiment:
        """The same prompts and seeds through both engines: here `real` is the reference's set and `both` that of the
        fast engine.
        """
        count, steps = self.scale.parity, self.scale.steps // 4  # there are few images
        engines = {"real": "torch", "both": "fast"}
        arms = {arm: lambda engine=engine: (self.generated(engine, count),) for arm, engine in engines.items()}
        scores = self.scores(arms, self.test_set(), steps=steps)
        images = {engine: len(arms[arm]()[0]) for arm, engine in engines.items()}
        return lambda: (scores(points("semantic", "miou")), {"steps": steps, "images": images})

    def steps_of(self, count: int) -> int:
        return self.scale.steps if count == self.scale.real else self.scale.short

    def facts(self, arms: dict[str, Sets], steps: int) -> Facts:
        """How many different images each side has."""
        real, synthetic = arms["both"]()
        images = {"real": len(real), "synthetic": len(synthetic), "left_out": synthetic.left_out}
        return {"steps": steps, "images": images}


def three(real: Callable[[], StudentData], synthetic: Callable[[], StudentData]) -> dict[str, Sets]:
    return {"real": lambda: (real(),), "synthetic": lambda: (synthetic(),), "both": lambda: (real(), synthetic())}
