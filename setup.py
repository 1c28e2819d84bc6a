"""Builds the package and its extension; CUDA sources join where nvcc is found (DATASETDM_CUDA=0 or 1 decides by
hand).
"""

import gzip
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from runpy import run_path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

FOLDERS = {"datasetdm_fast.kernels": "kernels", "datasetdm_fast.export": "export"}
ARCHITECTURES = ("80", "90", "100", "103", "120")
DATA = [
    "py.typed",
    "*.pyi",
    *(f"**/*.{suffix}" for suffix in ("json", "csv", "safetensors", "txt", "md", "html", "css", "js", "yaml")),
]


def date() -> int:
    """Seconds since 1970 of every file in a wheel or sdist; one date for all builds, as not every copy has git."""
    text = os.environ.get("SOURCE_DATE_EPOCH") or "1577836800"  # 2020-01-01
    if not re.fullmatch(r"\d{1,10}", text):
        raise SystemExit(f"SOURCE_DATE_EPOCH is {text!r}; it must be whole seconds since 1970, or unset")
    return int(text)


DATE = date()
CORES = run_path("datasetdm_fast/cores.py")["count_cores"]()  # for compilers; a container may have few of a machine's
NO_FOLDERS = f"-ffile-prefix-map={Path.cwd()}=."  # wherever it is compiled, the same machine code and no path in it


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
        nvcc, sources = find_nvcc(), sorted(Path("csrc").glob("*.cu"))
        of_cuda = f"{len(sources)} of CUDA by {nvcc}" if nvcc else "none of CUDA"
        print(f"compiling {len(ext.sources)} units of C++ and {of_cuda}, {CORES} at a time", flush=True)
        if nvcc:
            ext.define_macros.append(("DATASETDM_WITH_CUDA", "1"))
            with ThreadPoolExecutor(CORES) as pool:
                ext.extra_objects += pool.map(partial(self.compile_cuda, nvcc), sources)
            ext.library_dirs += library_folders(nvcc)
            ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
        super().build_extension(ext)

    def compile_cuda(self, nvcc: Path, source: Path) -> str:
        target = Path(self.build_temp).resolve() / f"{source.stem}.cu.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        host_options = f"-fPIC,-fvisibility=hidden,{NO_FOLDERS}"
        options = ["-O3", "-std=c++17", "--threads", "2", "-Xcompiler", host_options, *code_flags(nvcc)]
        command = [str(nvcc), "-c", str(source), "-o", str(target), *options]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
        return str(target)


class ReproducibleWheel(bdist_wheel):
    """bdist_wheel whose bytes depend on sources and compilers alone: of this checkout, dated DATE, with plain modes."""

    def run(self):
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # files of earlier builds
        self.compression = "stored"  # as it is packed again below
        super().run()
        path = Path(self.distribution.dist_files[-1][2])
        with zipfile.ZipFile(path) as archive:
            contents = [(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents:
                entry = zipfile.ZipInfo(name, time.gmtime(max(DATE, 315_532_800))[:6])  # zip begins with 1980
                entry.external_attr = (stat.S_IFREG | (0o755 if name.endswith(".so") else 0o644)) << 16
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED)


class ReproducibleSdist(sdist):
    """sdist with sorted entries, dated DATE, that belong to nobody."""

    formats = ["gztar"]

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        path = f"{base_name}.tar.gz"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(path, "wb") as file,
            gzip.GzipFile("", "wb", mtime=DATE, fileobj=file) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=anonymous)  # in the order of the names
        return path


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """An entry without what differs between two copies of the sources."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime, entry.mode = DATE, 0o755 if entry.isdir() else 0o644
    return entry


ParallelCompile(default=CORES).install()

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
            # older C libraries keep std::thread in a library of its own; -s leaves out the symbols, some of which are
            # random names of nvcc's temporary files
            extra_link_args=["-pthread", "-Wl,-s"],
            # some Pythons were built with -O2, which leaves the mask loops scalar
            extra_compile_args=["-O3", NO_FOLDERS],
        )
    ],
    cmdclass={"build_ext": BuildWithCuda, "bdist_wheel": ReproducibleWheel, "sdist": ReproducibleSdist},
    zip_safe=False,
)
