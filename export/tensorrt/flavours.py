"""The two TensorRTs behind one path: which is installed, what it serves, and what this machine lacks to run it."""

import ctypes
import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted.documents import quote

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}  # by module; the first that is installed is taken
DATA_CENTRE = {"sm90", "sm100", "sm103"}  # which TensorRT-RTX does not serve
FULL = (
    "Install NVIDIA's package tensorrt-cu13, which fetches its libraries from NVIDIA's own index: "
    "pip install 'datasetdm-fast[trt-full]', on a machine with an NVIDIA driver."
)
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...


@dataclass(frozen=True)
class Flavour:
    """An installed TensorRT."""

    module: ModuleType

    @property
    def title(self) -> str:
        return f"{TITLES[self.module.__name__]} {self.module.__version__}"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The GPUs that TensorRT-RTX serves; empty for the full TensorRT, which serves every one."""
        if self.module.__name__ != "tensorrt_rtx":
            return ()
        return tuple(name.lower() for name in self.module.ComputeCapability.__members__ if re.match(r"SM\d", name))

    def serves(self, capability: str) -> bool:
        return not self.capabilities or capability in self.capabilities


def find_flavour() -> Flavour:
    """The first installed flavour; raises Missing where none is installed."""
    broken = []
    for module in TITLES:
        if importlib.util.find_spec(module) is None:
            continue
        try:
            return Flavour(importlib.import_module(module))
        except (ImportError, OSError, RuntimeError) as error:
            broken.append(f"{module} is installed but does not load ({' '.join(str(error).split())[:120]})")
    if broken:
        cause, remedy = "; ".join(broken), "Reinstall it: its libraries are separate packages."
    else:
        cause = f"neither the module {' nor '.join(TITLES)} is installed"
        is_data_centre = bool(DATA_CENTRE.intersection(gpu_capabilities()))
        remedy = FULL if is_data_centre else "Install it with: pip install 'datasetdm-fast[trt]'."
    raise Missing(f"engine trt: {cause}; {describe_driver()}", remedy)


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


def require_gpu() -> Flavour:
    """The flavour that can run on a GPU here; raises Missing quickly where module, driver or GPU is missing."""
    flavour, gpus = find_flavour(), gpu_capabilities()
    if not gpus:
        raise Missing(
            f"engine trt: needs an NVIDIA GPU; found {flavour.title}, {describe_driver()}",
            "Run it on a machine with one, or use --engine fast.",
        )
    if not any(map(flavour.serves, gpus)):
        raise Missing(
            f"engine trt: {flavour.title} serves {', '.join(flavour.capabilities)}, and this machine has "
            f"{', '.join(gpus)}; {describe_driver()}",
            f"The full TensorRT serves this GPU. {FULL}",
        )
    return flavour


def choose_target(capability: str) -> tuple[Flavour, str]:
    """The flavour that builds plans here, and the GPU they are for: by name, which TensorRT-RTX needs no GPU for, or
    the first of this machine.
    """
    flavour = find_flavour() if capability else require_gpu()
    if capability not in ("", *flavour.capabilities):
        known = ", ".join(flavour.capabilities) or "those of the GPU at hand"
        raise Refused(
            f"--capability {quote(capability)}: {flavour.title} builds plans for {known}",
            "Choose one of these, or leave it out on the machine that runs the plans.",
        )
    return flavour, capability or next(filter(flavour.serves, gpu_capabilities()))
