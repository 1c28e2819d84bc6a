"""A folder of compiled kernels that is taken to another machine: what it was made by, and its way into use there.

Triton finds a kernel by a digest of its own files and of ptxas, of the kernel's source and of what it is specialised
for; so it has to be the same build of Triton, for the same Python. Triton also notes where the files of each kernel
lie, with the whole path, and compiles anew what is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused

NOTE = "made_by.json"
GROUP = "__grp__"  # Triton's lists of the files of one kernel
FACTS = ("triton", "python", "build", "ptxas")


def maker(targets: Iterable[str]) -> dict[str, Any]:
    """What decides whether kernels compiled here are found elsewhere."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    ptxas = {f"sm_{target}": get_ptxas_version(int(target)).split()[-1] for target in targets}
    build = hashlib.sha256(triton_key().encode()).hexdigest()
    python = ".".join(platform.python_version_tuple()[:2])
    return {"triton": triton.__version__, "python": python, "build": build, "ptxas": ptxas}


def sign(folder: Path, targets: Iterable[str], launches: int) -> None:
    """Notes in the folder by what its kernels were made."""
    note = maker(targets) | {"launches": launches}
    (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def adopt(folder: Path) -> int:
    """Makes the kernels of a folder that came from elsewhere findable in it; how many there are."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        here = maker(target.removeprefix("sm_") for target in note["ptxas"])
        differing = [name for name in FACTS if note[name] != here[name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"--adopt {folder}: holds no compiled kernels ({type(error).__name__}: {error})"
        raise Refused(cause, "name a folder made with --compile --cache") from error
    if differing:
        name = differing[0]
        raise Missing(
            f"--adopt {folder}: its kernels were compiled with {name} {note[name]}, this machine has {here[name]}",
            "Triton compiles them anew here, a few seconds in each process that launches them",
        )
    groups = sorted(folder.glob(f"*/{GROUP}*.json"))
    for path in groups:
        place(path)
    return len(groups)


def place(path: Path) -> None:
    """Names the files of one kernel where they lie now, beside their list."""
    names = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
    there = {name: str(path.parent.resolve() / Path(old).name) for name, old in names.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps({"child_paths": there}), encoding="utf-8")
    os.replace(part, path)
