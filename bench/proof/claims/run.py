"""python -m bench claims: do generated images help a student network, as in the papers' tables?

A student is trained on real demo scenes, on generated ones, and on both, for equally many steps, and scored on unseen
rendered scenes.
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.options import chosen, say
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import setting

PROG = "python -m bench claims"


@dataclass(frozen=True)
class ClaimsConfig:
    quick: bool = setting(
        False,
        "minutes: fewer seeds, steps, images and test scenes, too few for every claim to hold; nothing goes to "
        "bench/results",
    )
    seeds: int = setting(0, "students of each kind, 0 = 3, with --quick 2; at least 2", metavar="N")
    rows: tuple[str, ...] = setting(
        (),
        "only these claims, comma-separated (default: all of the papers); training-free "
        "compares labels from attention with those of the decoder",
        metavar="LIST",
    )
    repetition: int = setting(
        0,
        "the same with other generated images, unlabelled, validation and unseen scenes, and students: 1 to 19; the "
        "labelled scenes stay, and so do the decoders trained on them",
        metavar="N",
    )
    out: str = setting(
        "",
        "folder of generated images, students and the page; the same command resumes (default: runs/claims)",
        metavar="DIR",
    )
    tuned: bool = setting(
        False,
        "instead of the claims: every training set with its best training recipe, found by an equal search on "
        "validation scenes; also with unlabelled real images, and with ten times as many real ones",
    )
    arms: tuple[str, ...] = setting(
        (), "only these training sets of --tuned, comma-separated (default: all)", metavar="LIST"
    )
    real: int = setting(
        0, "with --tuned: number of real scenes, in rows added to those stored for 100; 0 = 100", metavar="N"
    )
    processes: int = setting(0, "students of --tuned trained at once, 0 = one per core", metavar="N")
    finished: bool = setting(
        False, "with --tuned: train nothing, and write the result file from the students that are stored"
    )
    json: bool = setting(False, "the rows as one JSON object on stdout")


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, ClaimsConfig, PROG, __doc__)
    if config.seeds and config.seeds < 2:
        raise Refused(f"--seeds {config.seeds}: expected at least 2, as one student has no spread", "ask for 2 or more")
    import torch

    torch.set_num_threads(1)
    from bench.proof.claims import page, training_free
    from bench.proof.claims.experiments import Experiments
    from bench.proof.claims.rows import CLAIMS
    from bench.proof.claims.sets import FULL, QUICK, REPETITIONS
    from bench.report import results

    names = chosen("rows", config.rows, (*CLAIMS, training_free.NAME), tuple(CLAIMS))
    scale = QUICK if config.quick else FULL
    if not 0 <= config.repetition < REPETITIONS:
        raise Refused(f"--repetition {config.repetition}: expected 0 to {REPETITIONS - 1}", "Choose another number.")
    scale = replace(scale, seeds=config.seeds or scale.seeds, repetition=config.repetition)
    folder = Path(config.out or f"runs/claims{'-quick' if config.quick else ''}")
    begin = time.monotonic()
    for name in ("arms", "real", "processes", "finished"):
        if getattr(config, name) and not config.tuned:
            raise Refused(f"--{name}: belongs to --tuned, which is missing", f"Add --tuned, or drop --{name}.")
    if config.tuned:
        return _tuned(config, scale, folder, arguments)
    if training_free.NAME in names:
        if len(names) > 1:
            raise Refused(
                f"--rows {','.join(names)}: {training_free.NAME} has students and a table of its own",
                f"Ask for {training_free.NAME} alone.",
            )
        return _training_free(config, scale, folder, arguments)
    with Experiments(folder, scale, say) as experiments:
        found = experiments.rows(names)
        document = described(found, scale, [*PROG.split(), *arguments], config.quick, time.monotonic() - begin)
        place = scale.place(folder)
        paths = [page.write(place, document, experiments), place / "claims.json"]
    if not (config.quick or config.repetition) and set(names) == set(CLAIMS):
        paths.append(results.default_path(document["machine"]).with_suffix(".claims.json"))
    for path in paths[1:]:
        results.ResultFile(path, document).save()
    say("\n".join(map(str, paths)))
    facts = {name: document[name] for name in ("machine", "scale", "command", "seconds")}
    print(json.dumps(found | facts) if config.json else page.terminal(document))
    return 0


def _tuned(config: ClaimsConfig, scale, folder: Path, arguments: Sequence[str]) -> int:
    from bench.proof.claims import tuned, tuned_page
    from bench.proof.claims.experiments import Experiments
    from bench.report import results

    names, count = chosen("arms", config.arms, tuple(tuned.ARMS), tuple(tuned.ARMS)), config.real or scale.real
    if count < 2:
        raise Refused(f"--real {count}: expected at least 2 scenes", "Ask for more.")
    begin = time.monotonic()
    with Experiments(folder, scale, say, config.processes) as experiments:
        asked = tuned.TunedArms(experiments, names, count)
        suite = "tuned" if asked.is_usual else results.FEWER
        suite += results.REPEATED if config.repetition else ""
        own = scale.place(folder) / f"{suite}.json"

        def result() -> dict[str, Any]:
            rows = asked.rows()
            document = described(rows, scale, [*PROG.split(), *arguments], config.quick, time.monotonic() - begin)
            return document | {"suite": suite, "tried": asked.tried(), "missing": asked.missing()}

        if config.finished:
            asked.look_for_students()
        for _ in () if config.finished else asked.train():
            results.ResultFile(own, result()).save()
        document, paths = result(), [own]
        if not document["rows"]:
            raise Refused(f"{folder}: no student has been judged yet", "Drop --finished, or name another --out.")
        if not config.quick and {"real", "both"} <= set(names):
            paths.append(results.default_path(document["machine"]).with_suffix(f".{suite}.json"))
        for path in paths:
            results.ResultFile(path, document).save()
    say("\n".join(map(str, paths)))
    print(json.dumps(document["rows"]) if config.json else tuned_page.section([document]))
    return 0


def _training_free(config: ClaimsConfig, scale, folder: Path, arguments: Sequence[str]) -> int:
    from bench.proof.claims import training_free
    from bench.proof.claims.experiments import Experiments
    from bench.report import results

    name, begin = training_free.NAME, time.monotonic()
    with Experiments(folder, scale, say) as experiments:
        found = {name: training_free.TrainingFree(experiments).row()}
    document = described(found, scale, [*PROG.split(), *arguments], config.quick, time.monotonic() - begin)
    document["suite"] = name
    paths = [scale.place(folder) / f"{name}.json"]
    if not (config.quick or config.repetition):
        paths.append(results.default_path(document["machine"]).with_suffix(f".{name}.json"))
    for path in paths:
        results.ResultFile(path, document).save()
    say("\n".join(map(str, paths)))
    print(json.dumps(found) if config.json else training_free.section(document))
    return 0


def described(rows: dict[str, Any], scale, command: Sequence[str], is_quick: bool, seconds: float) -> dict[str, Any]:
    import torch

    from bench.machine import machine
    from bench.report import results

    sizes = {"model": "demo", "quick": is_quick, **asdict(scale)}
    head = {"format": results.FORMAT, "suite": "claims", "date": results.now(), "command": shlex.join(command)}
    facts = {"machine": machine.describe(torch.device("cpu")), "setting": sizes, "scale": sizes}
    return {**head, **facts, "seconds": round(seconds, 1), "rows": rows, "parts": {}}
