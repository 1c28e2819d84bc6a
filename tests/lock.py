"""`python tests/lock.py [NAME==VERSION ...]` writes into requirements.lock and tests/requirements.lock the SHA-256 of
every file that the package index offers for each version they name, for CPython 3.11 and newer on Linux, macOS and
Windows; the versions given replace those that are there, or join those of the tests.

torch has no digests: machines with their own build of it bring other files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOCKS = (Path(__file__).parents[1] / "requirements.lock", Path(__file__).with_name("requirements.lock"))
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
FREE = ("torch",)
LINK = re.compile(r'/([^/"#?]+)#sha256=([0-9a-f]{64})')
PYTHONS = re.compile(r"(py2\.)?py3-|cp31[1-9]-(cp31\d|none)$|cp\d+-abi3")
PLATFORMS = re.compile(r"any|manylinux.*(x86_64|aarch64)|linux_(x86_64|aarch64)|macosx.*|win_amd64")


def normal(name: str) -> str:
    """A package's name as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def serves(wheel: str) -> bool:
    """Whether a wheel of this name runs on a Python and a platform that we support."""
    python, abi, platform = wheel.removesuffix(".whl").split("-")[-3:]
    return bool(PYTHONS.match(f"{python}-{abi}")) and bool(PLATFORMS.match(platform))


def digests(name: str, version: str) -> list[str]:
    """The SHA-256 of the files of one version: its wheels, or its source where no wheel is for every platform."""
    address = f"{INDEX.rstrip('/')}/{normal(name)}/"
    page = subprocess.run(["curl", "-fsSL", address], check=True, capture_output=True, text=True).stdout
    wheels, sources = {}, {}
    for file, digest in LINK.findall(page):
        stem = normal(file.removesuffix(".tar.gz"))
        if file.endswith(".whl") and file.split("-")[1] == version and serves(file):
            wheels[file] = digest
        elif file.endswith(".tar.gz") and stem == f"{normal(name)}-{normal(version)}":
            sources[file] = digest
    found = wheels if any(file.endswith("-any.whl") for file in wheels) else wheels | sources
    if not found:
        raise SystemExit(f"{name} {version}: {address} offers no file for it")
    return sorted(set(found.values()))


def read_lock(lock: Path) -> tuple[list[str], dict[str, str]]:
    """Comments of a lock file, and what it says of each package before the digests: version and marker."""
    lines = lock.read_text().splitlines()
    versions = [line.partition(" --hash")[0].split("==", 1) for line in lines if line and not line.startswith("#")]
    return [line for line in lines if line.startswith("#")], dict(versions)


def main() -> None:
    """Read the locks, ask the index about each version, and write them again."""
    locks = {lock: read_lock(lock) for lock in LOCKS}
    for given in sys.argv[1:]:
        name, version = given.split("==")
        places = [
            (versions, other) for _, versions in locks.values() for other in versions if normal(other) == normal(name)
        ]
        versions, other = places[0] if places else (locks[LOCKS[-1]][1], name)
        _, _, marker = versions.get(other, "").partition(" ; ")
        versions[other] = f"{version} ; {marker}" if marker else version
    for lock, (comments, versions) in locks.items():
        asked = [name for name in versions if name not in FREE]
        with ThreadPoolExecutor(8) as threads:
            found = dict(
                zip(asked, threads.map(lambda name, versions=versions: digests(name, versions[name].split()[0]), asked))
            )
        lines = [
            " ".join([f"{name}=={versions[name]}", *(f"--hash=sha256:{digest}" for digest in found.get(name, ()))])
            for name in sorted(versions, key=str.lower)
        ]
        lock.write_text("\n".join([*comments, *lines]) + "\n")
        print(f"{lock.name}: {len(versions)} versions, {sum(map(len, found.values()))} files")


if __name__ == "__main__":
    main()
