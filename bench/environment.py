"""python -m bench.environment libraries VENV [WHEELS], then build VENV: a virtual environment over the packages of this
interpreter, with what the product, its build and its tests lack there; torch and triton stay those of the machine.

It runs before anything is installed, so it needs the standard library and pip alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KEPT = "torch", "triton"
SITES = "site-packages", "dist-packages"
INHERITED = "zz_inherited.pth"  # read after the lines of what is installed there itself
PATIENCE = "--retries", "1", "--timeout", "15"  # where there is no network, an index is not waited for


def libraries(venv: Path, wheels: str = "") -> int:
    """Makes the environment where it is not there, and installs into it what is missing."""
    python = venv / "bin" / "python"
    if not python.exists():
        made(venv)
    with tempfile.TemporaryDirectory() as folder:
        wanted, pins = Path(folder, "wanted.txt"), Path(folder, "pins.txt")
        wanted.write_text("\n".join(requirements()))
        pins.write_text("\n".join(pinned()))
        install = [*installer(python), "install", "--quiet", *PATIENCE, "--requirement", wanted, "--constraint", pins]
        # First with what is there; only what that leaves open is asked for elsewhere.
        local = subprocess.run([*install, "--no-index", *(["--find-links", wheels] if wheels else [])])
        if local.returncode and (wheels or subprocess.run(install).returncode):
            print(f"{venv}: libraries are missing, pip names them above; WHEELS names a folder of wheels")
            return 3
    return same_torch(python)


def build(venv: Path) -> int:
    """Compiles the extension for this checkout, unless the environment has it already."""
    python = venv / "bin" / "python"
    if is_built(python):
        return 0
    flags = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--editable", "."]
    if subprocess.run([*installer(python), "install", *flags]).returncode:
        print("the extension was not built, the compiler says above why")
        return 3
    return 0


def made(venv: Path) -> None:
    """One made from another sees the system's packages alone, so the folders this interpreter sees are named to it."""
    import venv as builder

    part = venv.with_name(f"{venv.name}.part")  # a call that is cut leaves no half of one
    builder.create(part, with_pip=not has_pip(), symlinks=True, clear=True)
    (site,) = part.glob("lib/python3*/site-packages")
    (site / INHERITED).write_text("".join(f"{place}\n" for place in sys.path if place.endswith(SITES)))
    part.rename(venv)


def has_pip() -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


def installer(python: Path) -> list[str]:
    """The command of pip that installs into the environment: ours, or its own where this interpreter has none."""
    command = [sys.executable, "-m", "pip", "--python", str(python)] if has_pip() else [str(python), "-m", "pip"]
    return [*command, "--disable-pip-version-check"]


def requirements() -> list[str]:
    """Of project, build and tests, without those that are kept."""
    listed = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    extra = listed["project"]["optional-dependencies"]["dev"]
    found = [*listed["project"]["dependencies"], *listed["build-system"]["requires"]]
    found += [one for one in extra if one.startswith("pytest")]
    return [one for one in found if re.match(r"[\w-]+", one)[0] not in KEPT]


def pinned() -> list[str]:
    """The versions of this interpreter that no installation may exchange."""
    found = []
    for name in KEPT:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return found


def is_built(python: Path) -> bool:
    """Whether the product is installed there with CUDA; from another folder, as this one holds its sources."""
    asked = "import datasetdm_fast.kernels; from datasetdm_fast import _C; raise SystemExit(not _C.built_with_cuda)"
    return subprocess.run([python, "-c", asked], capture_output=True, cwd="/").returncode == 0


def same_torch(python: Path) -> int:
    asked = "import torch; print(torch.__version__, torch.__file__)"
    ours, theirs = (
        subprocess.run([one, "-c", asked], capture_output=True, text=True).stdout.strip()
        for one in (python, sys.executable)
    )
    print(f"torch {ours}")
    if ours != theirs:
        print(f"the machine's own is {theirs}")
    return 0 if ours == theirs else 3


STEPS = {"libraries": libraries, "build": build}

if __name__ == "__main__":
    sys.exit(STEPS[sys.argv[1]](Path(sys.argv[2]).absolute(), *sys.argv[3:]))
