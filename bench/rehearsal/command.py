"""python -m bench rehearse: what `generate` would launch on a GPU, in which order, and what is wrong with it; no GPU
is needed.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.options import check_numbers, say
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.settings import setting

if TYPE_CHECKING:
    from bench.rehearsal.kernels import Compilable, NotedLaunch
    from bench.rehearsal.run import Rehearsal
    from bench.rehearsal.timeline import Flaw

PROG, ALL = "python -m bench rehearse", "all"
TARGETS = ("80", "90", "100", "120")
SCENARIOS = (  # functions of scenarios.py and teaching.py
    "decoders", "attention", "words", "label", "tiles", "labeller", "files", "library", "features", "samplers",
    "retry", "between", "memory", "cards", "verify", "joint", "joint-verify", "training", "losses", "bins",
    "recomputed", "evaluation", "students",
)  # fmt: skip

GRADIENTS = ("training", "losses", "bins", "recomputed", "students")  # scenarios that compute some


@dataclass(frozen=True)
class RehearsalConfig:
    model: str = setting("tiny", "the sizes to rehearse at", choices=("tiny", "random-sd14", "random-sdxl"))
    batch: int = setting(4, "images per batch", metavar="N")
    batches: int = setting(2, "batches of the run", metavar="N")
    dtype: str = setting("auto", "precision of the engine", choices=("auto", "fp32", "tf32", "fp16", "bf16"))
    device: str = setting(
        "cuda:1",
        "cuda or cuda:N of two simulated GPUs; on the second, a launch that forgets its device is found, too",
        metavar="DEVICE",
    )
    scenario: tuple[str, ...] = setting(
        ("decoders",),
        f"what is run, comma-separated: {', '.join(SCENARIOS)}; all of these",
        choices=(*SCENARIOS, ALL),
        metavar="LIST",
    )
    compile: bool = setting(
        False, "compile every launched kernel, and check its registers, shared memory and instructions"
    )
    targets: tuple[str, ...] = setting(
        TARGETS, "with --compile: compute capabilities, times ten, comma-separated", choices=TARGETS, metavar="LIST"
    )
    cache: str = setting(
        "", "with --compile: folder for the compiled kernels, for another machine", metavar="DIR", output="folder"
    )
    adopt: str = setting("", "make the kernels of a folder that came from another machine usable here", metavar="DIR")
    budget: bool = setting(
        False, "instead: compare the estimated cost of four models' calls with bench/gpu_budget.json"
    )
    update: bool = setting(False, "with --budget: write the estimate into that file")
    json: bool = setting(False, "one JSON object on standard output")


def main(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse

    config, _ = parse(arguments, RehearsalConfig, PROG, __doc__)
    check_numbers(batch=config.batch - 1, batches=config.batches - 1)
    if config.cache and not config.compile:
        raise Refused(
            f"{PROG}: --cache {config.cache} without --compile, so nothing would be compiled", "add --compile"
        )
    if config.cache:
        os.environ["TRITON_CACHE_DIR"] = config.cache
    from datasetdm_fast.kernels import launch

    if launch.triton is None:
        raise Missing(f"{PROG}: Triton is not installed", "pip install 'datasetdm-fast[triton]'")
    if launch.IS_INTERPRETED:
        raise Refused(f"{PROG}: TRITON_INTERPRET is set, so no kernel would be launched", "unset it")
    warnings.simplefilter("ignore")
    if config.adopt:
        return adopted(Path(config.adopt))
    return budgeted(config) if config.budget else rehearsed(config)


def rehearsed(config: RehearsalConfig) -> int:
    from bench.rehearsal.compiled import gpus
    from bench.rehearsal.cuda import CAPABILITY
    from bench.rehearsal.run import rehearse

    wanted = possible(config.scenario)
    sizes = {"batches": config.batches, "dtype": config.dtype, "device": config.device}
    simulated = gpus(config.targets) if config.compile else {CAPABILITY: []}
    documents, findings, kernels = [], [], {capability: {} for capability in simulated}
    for name in wanted:
        runs = {}
        for capability in simulated:
            begin = time.monotonic()
            found = rehearse(config.model, config.batch, **sizes, scenario=name, capability=capability)
            runs[number := ".".join(map(str, capability))] = found
            say(
                f"{name}, {config.model}, {config.batches} batches of {config.batch}, compute capability {number}: "
                f"{len(found.launches)} operations launched or recorded, {found.replays} replays of "
                f"{len(found.graphs)} graphs, {len(found.kernels)} compiled forms of kernels, {len(found.findings)} "
                f"findings, {time.monotonic() - begin:.0f} s"
            )
            kernels[capability] |= found.kernels
        documents.append({"scenario": name, **document(runs)})
        if not config.json:
            tell(runs)
        findings += [one for one, _ in joined(runs, "findings")]
    if config.json:
        print(json.dumps(documents, indent=1))
    if config.compile:
        compiled([(kernels[capability], targets) for capability, targets in simulated.items()], config)
    if findings:
        first = findings[0]
        raise GateFailed(
            f"bench rehearse: {len(findings)} findings, first {first.rule}: {first.what} at {first.place}",
            "the lines above name each with its place",
        )
    return 0


def possible(names: Sequence[str]) -> tuple[str, ...]:
    """The scenarios to run; gradients need a PyTorch without CUDA, as one with it asks for a GPU that is not there."""
    import torch

    wanted = SCENARIOS if ALL in names else tuple(names)
    lost = [name for name in wanted if name in GRADIENTS] if torch.backends.cuda.is_built() else []
    if lost and ALL not in names:
        raise Missing(
            f"{PROG}: the scenario {lost[0]} computes gradients on simulated GPUs, which a PyTorch with CUDA cannot do",
            "Install PyTorch's build for CPUs in an environment of its own, or leave that scenario out.",
        )
    if lost:
        say(f"left out, as they need PyTorch's build for CPUs: {', '.join(lost)}")
    return tuple(name for name in wanted if name not in lost)


def joined(runs: Mapping[str, Rehearsal], part: str) -> dict[tuple[Flaw, int], list[str]]:
    """The findings or the waits of all runs, each with how often it occurred -> the compute capabilities where."""
    found: dict[tuple[Flaw, int], list[str]] = {}
    for capability, run in runs.items():
        for row in getattr(run, part).items():
            found.setdefault(row, []).append(capability)
    return found


def document(runs: Mapping[str, Rehearsal]) -> dict[str, Any]:
    """What --json says of a scenario, from its runs by compute capability."""
    rows = {}
    for name in ("findings", "waits"):
        found = joined(runs, name).items()
        rows[name] = [asdict(one) | {"count": count, "gpus": where} for (one, count), where in found]
    facts = {
        capability: {
            "launches": len(run.launches),
            "replays": run.replays,
            "samples": run.samples,
            "kernels": len(run.kernels),
        }
        for capability, run in runs.items()
    }
    return {**rows, "gpus": facts}


def tell(runs: Mapping[str, Rehearsal]) -> None:
    """A line for every wait that is allowed, and three for every finding, with its compute capabilities if there are
    several.
    """
    from bench.rehearsal.run import reason_of

    def on(where: Sequence[str]) -> str:
        return f", on {' and '.join(where)}" if len(runs) > 1 else ""

    for (one, count), where in joined(runs, "waits").items():
        place = one.place.partition(" <")[0]
        print(f"allowed: {count} x {one.what}, {place} ({one.thread}{on(where)}): {reason_of(one)}")
    for (one, count), where in joined(runs, "findings").items():
        print(f"{one.rule.upper()}: {count} x {one.what}\n    {one.place} ({one.thread}, {one.phase}{on(where)})")
        print(f"    {one.code}")


def budgeted(config: RehearsalConfig) -> int:
    from bench.rehearsal import budget

    found = budget.reckoned()
    if config.update:
        budget.store(found)
    lines = budget.risen(found, budget.stored())
    if config.json:
        print(json.dumps({"calls": {name: asdict(one) for name, one in found.calls.items()}, "risen": lines}, indent=1))
    else:
        for name, one in found.calls.items():
            print(
                f"{name:28} {one.launches:5} launches {one.gigabytes:8.2f} GB {one.tflop:8.3f} TFLOP "
                f"{one.milliseconds:8.2f} ms"
            )
    if lines:
        say("\n".join(lines))
        raise GateFailed(
            f"bench rehearse: {len(lines)} figures rose above {budget.BUDGET.name}, first {lines[0]}",
            "make it cheaper, or write the new figures with --budget --update and say why in the commit",
        )
    return 0


def adopted(folder: Path) -> int:
    from bench.rehearsal import carried

    say(f"{folder}: {carried.adopt(folder)} compiled kernels; TRITON_CACHE_DIR={folder} lets a run take them")
    return 0


def compiled(kernels: Sequence[tuple[Mapping[Compilable, NotedLaunch], list[str]]], config: RehearsalConfig) -> None:
    """A line for every kernel and target, from what was launched and the targets it was launched for; what does not fit
    fails.
    """
    from bench.rehearsal import carried
    from bench.rehearsal.compiled import rows

    wrong, forms = [], set(chain.from_iterable(launches for launches, _ in kernels))
    for row, reason in chain.from_iterable(rows(launches.values(), targets) for launches, targets in kernels):
        print(
            f"{row.kernel:24} sm_{row.target:4} {row.registers:4} registers {row.spills:5} B stack "
            f"{row.shared:7} B shared  {reason}",
            flush=True,
        )
        wrong += [f"{row.kernel}, sm_{row.target}: {reason}"] if reason else []
    if config.cache:
        carried.sign(Path(config.cache), config.targets, len(forms))
    if wrong:
        raise GateFailed(
            f"bench rehearse: {len(wrong)} compiled kernels, first {wrong[0]}",
            "choose other blocks in BLOCKS of the kernel's file",
        )
