"""The machine a measurement is taken on."""

import os
import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.machine.nvml import Nvml
from datasetdm_fast.cores import count_cores
from datasetdm_fast.engine.engines import name_processor
from datasetdm_fast.version import __version__

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "onnxruntime", "onnxruntime-gpu")
LIBRARIES += ("tensorrt", "tensorrt-rtx")
OPENMP = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"  # how its threads wait


@cache
def nvml(device: torch.device) -> Nvml:
    return Nvml(str(torch.cuda.get_device_properties(device).uuid))


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, clocks and versions, as a result file holds them."""
    versions = {"datasetdm_fast": __version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    common = {"kind": device.type, "commit": commit(), "versions": versions}
    common |= {"cores": count_cores(), "threads": torch.get_num_threads()}
    common["openmp"] = {name: os.environ[name] for name in OPENMP if name in os.environ}
    if device.type == "cpu":
        told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        clocks, is_avx2 = re.findall(r"cpu MHz\s*: ([\d.]+)", told), torch.backends.cpu.get_cpu_capability() == "AVX2"
        name = f"{name_processor()}{' @ AVX2' * is_avx2}, {common['cores']} cores"  # virtual ones share a name
        clock = {"cpu_mhz": round(max(map(float, clocks))) if clocks else None}  # of the fastest core right now
        return {"device": name, "driver": f"Linux {platform.release()}", "clocks": clock, **common}
    found = torch.cuda.get_device_properties(device)
    facts = {"capability": f"{found.major}.{found.minor}", "memory_gib": round(found.total_memory / 2**30, 1)}
    return {"device": found.name, "driver": nvml(device).driver, "clocks": nvml(device).state(), **facts, **common}


def commit() -> str:
    """What COMMIT names, for a copy without history, or the commit of this checkout, with `-changed` where files differ
    from it; `unknown` outside of one.
    """
    if named := os.environ.get("COMMIT"):
        return named
    if not (head := _git("rev-parse", "--short=7", "HEAD")):
        return "unknown"
    return head + ("-changed" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
