"""Builds the package and its extension; CUDA sources join where nvcc is found (DATASETDM_CUDA=0 or 1 decides by
hand).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

FOLDERS = {"datasetdm_fast.kernels": "kernels", "datasetdm_fast.export": "export"}
ARCHITECTURES = ("80", "90", "120")
DATA = [
    "py.typed",
    "*.pyi",
    *(f"**/*.{suffix}" for suffix in ("json", "csv", "safetensors", "txt", "md", "html", "css", "js", "yaml")),
]


def packages() -> list[str]:
    mapped = [
        name
        for top, folder in FOLDERS.items()
        for name in (top, *(f"{top}.{inner}" for inner in find_packages(folder)))
    ]
    return find_packages(include=["datasetdm_fast", "datasetdm_fast.*"], exclude=list(mapped)) + mapped


def find_nvcc() -> Path | None:
    """The CUDA compiler, or None where the extension is to be built for the CPU alone."""
    wish = os.environ.get("DATASETDM_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(
            f"DATASETDM_CUDA is {wish!r}; it must be 0 (CPU only), 1 (CUDA required) or unset (CUDA where nvcc is "
            "found)"
        )
    found = None if wish == "0" else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if wish == "1" and not found:
        raise SystemExit("DATASETDM_CUDA=1 asks for CUDA, but nvcc is neither on PATH nor in /usr/local/cuda/bin")
    return Path(found) if found else None


def code_flags(nvcc: Path) -> list[str]:
    """Machine code for every architecture this nvcc knows, and PTX of the newest of them for GPUs yet to come."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    chosen = [number for number in ARCHITECTURES if f"compute_{number}" in known]
    if not chosen:
        raise SystemExit(
            f"{nvcc} compiles for none of sm_{', sm_'.join(ARCHITECTURES)}; set DATASETDM_CUDA=0 or install CUDA "
            "12.8 or newer"
        )
    machine = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
    return [*machine, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def library_folders(nvcc: Path) -> list[str]:
    """Where nvcc itself would link from: its path alone does not say, as it may be a wrapper script or a link."""
    told = subprocess.run(
        [nvcc, "--dryrun", "-c", "csrc/device.cu", "-o", os.devnull], check=True, capture_output=True, text=True
    ).stderr
    return re.findall(r'"-L([^"]+)"', next(line for line in told.splitlines() if "LIBRARIES=" in line))


class BuildWithCuda(build_ext):
    """build_ext that has nvcc compile csrc/*.cu and links the runtime statically: importing needs no driver."""

    def build_extension(self, ext):
        nvcc = find_nvcc()
        if nvcc:
            ext.define_macros.append(("DATASETDM_WITH_CUDA", "1"))
            ext.extra_objects += [self.compile_cuda(nvcc, source) for source in sorted(Path("csrc").glob("*.cu"))]
            ext.library_dirs += library_folders(nvcc)
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        super().build_extension(ext)

    def compile_cuda(self, nvcc: Path, source: Path) -> str:
        target = Path(self.build_temp).resolve() / f"{source.stem}.cu.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        options = ["-O3", "-std=c++17", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden", *code_flags(nvcc)]
        command = [str(nvcc), "-c", str(source), "-o", str(target), *options]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
        return str(target)


ParallelCompile(default=0).install()  # as many compilers as cores

setup(
    packages=packages(),
    package_dir={"datasetdm_fast": "datasetdm_fast", **FOLDERS},
    package_data={"datasetdm_fast": DATA},
    include_package_data=False,
    ext_modules=[
        Pybind11Extension(
            "datasetdm_fast._C",
            sorted(str(source) for source in Path("csrc").glob("*.cpp")),
            depends=sorted(str(source) for pattern in ("*.h", "*.cu") for source in Path("csrc").glob(pattern)),
            cxx_std=17,
            extra_link_args=["-pthread"],  # older C libraries keep std::thread in a library of its own
            extra_compile_args=["-O3"],  # some Pythons were built with -O2, which leaves the mask loops scalar
        )
    ],
    cmdclass={"build_ext": BuildWithCuda},
    zip_safe=False,
)
