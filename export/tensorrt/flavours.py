"""The two TensorRTs behind one path: which is installed, what it knows, and what this machine lacks to run it."""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from datasetdm_fast.errors import Missing, Refused

# flavour -> module, the first of them that is installed is taken
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
DATA_CENTRE = {"sm90", "sm100", "sm103"}
INSTALL = {
    "tensorrt": "Install it with: pip install 'datasetdm-fast[trt-full]', on a machine with an NVIDIA driver.",
    "tensorrt-rtx": "Install it with: pip install 'datasetdm-fast[trt]'.",
}


@dataclass(frozen=True)
class Flavour:
    """An installed TensorRT."""

    name: str
    version: str
    cuda: str  # major version of the CUDA its libraries were built for, empty where unknown

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]} {self.version}"

    @functools.cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(MODULES[self.name])

    @property
    def capabilities(self) -> tuple[str, ...]:
        """GPUs it builds plans for without having them; none where it builds for the GPU of this machine alone."""
        if self.name != "tensorrt-rtx":
            return ()
        names = (re.fullmatch(r"SM(\d+)", name) for name in self.module.ComputeCapability.__members__)
        return tuple(f"sm{found[1]}" for found in names if found)

    @property
    def is_portable(self) -> bool:
        return bool(self.capabilities)


def find(name: str = "auto", asker: str = "engine trt") -> Flavour:
    """The flavour of that name, or the first installed one; raises Missing, for `asker`, where there is none."""
    tried = tuple(MODULES) if name == "auto" else (name,)
    broken = []
    for flavour in tried:
        if importlib.util.find_spec(MODULES[flavour]) is None:
            continue
        try:
            version = importlib.import_module(MODULES[flavour]).__version__
        except (ImportError, OSError, RuntimeError) as error:
            broken.append(f"{MODULES[flavour]} is installed but does not load ({_short(error)})")
        else:
            return Flavour(flavour, version, _cuda_of(MODULES[flavour]))
    if broken:
        raise Missing(f"{asker}: {'; '.join(broken)}; {driver()}", "Reinstall it: its libraries are separate packages.")
    names = " nor ".join(MODULES[flavour] for flavour in tried)
    said = f"neither the module {names} is installed" if len(tried) > 1 else f"the module {names} is not installed"
    raise Missing(f"{asker}: {said}; {driver()}", INSTALL[_fitting(gpu_capabilities()) if name == "auto" else name])


def _fitting(gpus: Sequence[str]) -> str:
    """The flavour to recommend for these GPUs: data-centre ones from Hopper on need the full TensorRT."""
    return "tensorrt" if set(gpus) & DATA_CENTRE else "tensorrt-rtx"


def _cuda_of(module: str) -> str:
    for cuda in ("13", "12"):
        for suffix in ("", "_bindings"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(f"{module}_cu{cuda}{suffix}")
                return cuda
    return ""


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _driver_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def driver() -> str:
    """What there is of an NVIDIA driver, as a phrase."""
    if (library := _driver_library()) is None:
        return "no NVIDIA driver was found (libcuda.so.1)"
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    code = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    kernel = Path("/proc/driver/nvidia/version")
    told = kernel.read_text(encoding="utf-8", errors="replace") if kernel.is_file() else ""
    cuda, found = version.value // 1000, re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", told)
    name = f"driver {found[1]}, CUDA {cuda}.{version.value % 1000 // 10}" if found else f"driver for CUDA {cuda}"
    return f"{name}, " + (f"which reports error {code}" if code else f"with {count.value} GPUs")


def gpu_capabilities() -> list[str]:
    """The capability of each GPU of this machine, asked of the driver: without torch or a CUDA context."""
    library, count, found = _driver_library(), ctypes.c_int(0), []
    if library is None or library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for place in range(count.value):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        if not library.cuDeviceGet(ctypes.byref(device), place):
            library.cuDeviceGetAttribute(
                ctypes.byref(major), 75, device
            )  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
            library.cuDeviceGetAttribute(
                ctypes.byref(minor), 76, device
            )  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
            found.append(f"sm{major.value}{minor.value}")
    return found


def require_gpu(name: str = "auto") -> Flavour:
    """The flavour that can run on a GPU here; raises Missing quickly where module, driver or GPU is not there."""
    flavour, gpus = find(name), gpu_capabilities()
    if not gpus:
        raise Missing(
            f"engine trt: needs an NVIDIA GPU; found the module {MODULES[flavour.name]} {flavour.version}, {driver()}",
            "Run it on a machine with one, or use --engine fast; `python -m datasetdm_fast.export --to tensorrt-rtx` "
            "builds plans here for such a machine.",
        )
    if flavour.is_portable and not any(serves(flavour, gpu) for gpu in gpus):
        if name == "auto" and flavour.name != "tensorrt" and importlib.util.find_spec("tensorrt"):
            return find("tensorrt")
        raise Missing(
            f"engine trt: {flavour.title} serves {', '.join(flavour.capabilities)}, and this machine has "
            f"{', '.join(gpus)}; {driver()}",
            "Install the full TensorRT, which serves this GPU: pip install 'datasetdm-fast[trt-full]'; then "
            "--trt-flavour tensorrt.",
        )
    return flavour


def serves(flavour: Flavour, capability: str) -> bool:
    return not flavour.is_portable or capability in flavour.capabilities


def check_capabilities(flavour: Flavour, wanted: Sequence[str], gpus: Sequence[str]) -> tuple[str, ...]:
    """The capabilities to build for: those asked for, or this machine's GPU, or none where plans are portable."""
    if flavour.is_portable:
        for capability in wanted:
            if capability not in flavour.capabilities:
                hopper = "; the full tensorrt serves such GPUs" if capability in DATA_CENTRE else ""
                raise Refused(
                    f"--capability {capability}: {flavour.title} does not know it, it knows "
                    f"{', '.join(flavour.capabilities)}{hopper}",
                    "Choose from these, or leave the flag out for a plan that serves all of them from Ampere on.",
                )
        return tuple(dict.fromkeys(wanted))
    if not gpus:
        raise Missing(
            f"--to tensorrt: {flavour.title} builds on the GPU it builds for, and here {driver()}",
            "Build on that machine, or use --to tensorrt-rtx here.",
        )
    for capability in wanted:
        if capability != gpus[0]:
            raise Refused(
                f"--capability {capability}: {flavour.title} builds for the GPU of this machine alone, which is "
                f"{gpus[0]}",
                "Build on a machine with that GPU, or use --to tensorrt-rtx.",
            )
    return (gpus[0],)
