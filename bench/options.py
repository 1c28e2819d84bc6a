"""Flags and checks that the bench's commands share."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from datasetdm_fast.cores import before_torch
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import setting

FULL_SIZE_MODEL = "random-sd14"  # Stable Diffusion 1.4 with seeded weights


@dataclass(frozen=True)
class SuiteConfig:
    """What the suites of CPU and GPU are told alike."""

    model: str = setting("demo", "demo, tiny, random-sd14, a diffusers folder or a file", metavar="MODEL")
    out: str = setting(
        "", "result file (default: bench/results/DATE-DEVICE-COMMIT.json)", metavar="FILE", output="file"
    )
    quick: bool = setting(False, "fewer sizes and images, to test the parts")
    parts: tuple[str, ...] = setting((), "only these parts, comma-separated (default: all)", metavar="LIST")
    json: bool = setting(False, "ratios, parity and every row as one JSON object on stdout")


def prepare() -> None:
    """Settings that must be made before torch is imported, and quiet libraries."""
    before_torch()
    # Eager PyTorch waits after each small operation: where threads sleep at once, it loses more than half of its speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above all that the profiler of PyTorch says
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def check_numbers(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise Refused(f"--{name} {value}: expected a number of 0 or more", "choose another number")


def chosen(flag: str, asked: Sequence[str], known: Sequence[str], usual: Sequence[str]) -> tuple[str, ...]:
    from datasetdm_fast.command_line.flags import nearest

    for name in asked:
        if name not in known:
            cause = f"--{flag} {name}: there is no such one{nearest(name, known)}"
            raise Refused(cause, f"choose from {', '.join(known)}")
    return tuple(asked) or tuple(usual)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
