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
    "tensorrt": "Install NVIDIA's package tensorrt-cu13, which fetches its libraries from NVIDIA's own index: "
    "pip install 'datasetdm-fast[trt-full]', on a machine with an NVIDIA driver.",
    "tensorrt-rtx": "Install it with: pip install 'datasetdm-fast[trt]'.",
}
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


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
        return tuple(name.lower() for name in self.module.ComputeCapability.__members__ if re.match(r"SM\d", name))

    @property
    def is_portable(self) -> bool:
        return bool(self.capabilities)

    def serves(self, capability: str) -> bool:
        """Whether it runs plans on a GPU of that capability."""
        return not self.is_portable or capability in self.capabilities


def find_flavour(name: str = "auto", asker: str = "engine trt") -> Flavour:
    """The flavour of that name, or the first installed one; raises Missing, for `asker`, where none is installed."""
    names = tuple(MODULES) if name == "auto" else (name,)
    broken = []
    for flavour in names:
        module = MODULES[flavour]
        if importlib.util.find_spec(module) is None:
            continue
        try:
            return Flavour(flavour, importlib.import_module(module).__version__, _read_cuda_version(module))
        except (ImportError, OSError, RuntimeError) as error:
            broken.append(f"{module} is installed but does not load ({' '.join(str(error).split())[:120]})")
    if broken:
        cause, remedy = "; ".join(broken), "Reinstall it: its libraries are separate packages."
    elif name == "auto":
        fitting = "tensorrt" if set(gpu_capabilities()) & DATA_CENTRE else "tensorrt-rtx"
        cause, remedy = f"neither the module {' nor '.join(MODULES.values())} is installed", INSTALL[fitting]
    else:
        cause, remedy = f"the module {MODULES[name]} is not installed", INSTALL[name]
    raise Missing(f"{asker}: {cause}; {describe_driver()}", remedy)


def _read_cuda_version(module: str) -> str:
    for cuda in ("13", "12"):
        for suffix in ("", "_bindings"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(f"{module}_cu{cuda}{suffix}")
                return cuda
    return ""


def _load_driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def describe_driver() -> str:
    """What is installed of an NVIDIA driver, as a phrase."""
    if (library := _load_driver()) is None:
        return "no NVIDIA driver was found (libcuda.so.1)"
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    code = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    kernel = Path("/proc/driver/nvidia/version")
    text = kernel.read_text(encoding="utf-8", errors="replace") if kernel.is_file() else ""
    cuda, match = version.value // 1000, re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    name = f"driver {match[1]}, CUDA {cuda}.{version.value % 1000 // 10}" if match else f"driver for CUDA {cuda}"
    return f"{name}, " + (f"which reports error {code}" if code else f"with {count.value} GPUs")


def gpu_capabilities() -> list[str]:
    """The capability of each GPU of this machine, read from the driver: without torch or a CUDA context."""
    library, count, capabilities = _load_driver(), ctypes.c_int(0), []
    if library is None or library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for place in range(count.value):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        if not library.cuDeviceGet(ctypes.byref(device), place):
            library.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
            library.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
            capabilities.append(f"sm{major.value}{minor.value}")
    return capabilities


def require_gpu(name: str = "auto") -> Flavour:
    """The flavour that can run on a GPU here; raises Missing quickly where module, driver or GPU is missing."""
    flavour, gpus = find_flavour(name), gpu_capabilities()
    if not gpus:
        raise Missing(
            f"engine trt: needs an NVIDIA GPU; found the module {MODULES[flavour.name]} {flavour.version}, "
            f"{describe_driver()}",
            "Run it on a machine with one, or use --engine fast; `python -m datasetdm_fast.export --to tensorrt-rtx` "
            "builds plans here for such a machine.",
        )
    if not any(map(flavour.serves, gpus)):
        raise Missing(
            f"engine trt: {flavour.title} serves {', '.join(flavour.capabilities)}, and this machine has "
            f"{', '.join(gpus)}; {describe_driver()}",
            f"The full TensorRT serves this GPU. {INSTALL['tensorrt']} Then choose --trt-flavour tensorrt.",
        )
    return flavour


def check_capabilities(flavour: Flavour, requested: Sequence[str], gpus: Sequence[str]) -> tuple[str, ...]:
    """The capabilities to build for: those requested, or this machine's GPU, or none where plans are portable."""
    if not flavour.is_portable and not gpus:
        raise Missing(
            f"--to tensorrt: {flavour.title} builds on the GPU it builds for, and here {describe_driver()}",
            "Build on that machine, or use --to tensorrt-rtx here.",
        )
    supported = flavour.capabilities or tuple(gpus[:1])
    for capability in requested:
        if capability not in supported:
            raise Refused(
                f"--capability {capability}: {flavour.title} builds here for {', '.join(supported)}",
                "Choose from these, or leave the flag out; the full TensorRT builds for the GPU of its own machine.",
            )
    return tuple(dict.fromkeys(requested)) if flavour.is_portable else supported
