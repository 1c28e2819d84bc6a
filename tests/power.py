"""What a loss of power may leave: the calls written down by tests/fault_shim.c, replayed up to any of them with what
was not synced gone or torn.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class File:
    """One file as the programs see it, and as it is on the disk."""

    seen: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    last: tuple[int, bytes] | None = None  # the latest write that was not synced


def calls(log: bytes) -> Iterator[tuple[str, str, str, int, bytes]]:
    """Letter, two names, offset and bytes of every call."""
    place = 0

    def take(size: int) -> bytes:
        nonlocal place
        place += size
        return log[place - size : place]

    while place < len(log):
        letter = take(1).decode()
        first, second = (take(struct.unpack("<I", take(4))[0]).decode() for _ in range(2))
        (offset,) = struct.unpack("<q", take(8))
        yield letter, first, second, offset, take(struct.unpack("<I", take(4))[0])


class Disk:
    """Files and names, in the state programs see and in the one that is safe."""

    def __init__(self, root: str) -> None:
        self.names: dict[str, File] = {}
        self.safe_names: dict[str, File] = {}
        self.folders: set[str] = set()
        self.safe_folders: set[str] = {root}  # it lies in a folder that is not watched
        self.made = 0  # samples acknowledged so far

    def meet(self, letter: str, first: str, second: str, offset: int, data: bytes) -> None:
        if letter == "o":
            self.names[first] = File()
        elif letter == "w":
            file = self.names[first]
            file.seen[len(file.seen) : offset] = bytes(max(offset - len(file.seen), 0))
            file.seen[offset : offset + len(data)] = data
            file.last = (offset, data)
        elif letter == "t":
            file = self.names[first]
            del file.seen[offset:]
            file.seen.extend(bytes(offset - len(file.seen)))
        elif letter == "r":
            self.names[second] = self.names.pop(first)
        elif letter == "u":
            del self.names[first]
        elif letter == "m":
            self.folders.add(first)
        elif letter == "s" and first in self.names:
            file = self.names[first]
            file.safe, file.last = bytes(file.seen), None
        elif letter == "s":
            self.safe_names = {name: file for name, file in self.safe_names.items() if os.path.dirname(name) != first}
            self.safe_names |= {name: file for name, file in self.names.items() if os.path.dirname(name) == first}
            self.safe_folders |= {folder for folder in self.folders if os.path.dirname(folder) == first}
        elif letter == "k":
            self.made = offset

    def left(self, kind: str) -> tuple[set[str], dict[str, bytes]]:
        """Folders and files after the loss: `all dropped`, `names kept` (a rename outlives the data), `torn`, `data
        kept` (the other way round).
        """
        folders = self.safe_folders if kind in ("all dropped", "data kept") else self.folders
        names = self.safe_names if kind in ("all dropped", "data kept") else self.names
        reachable = {name: file for name, file in names.items() if os.path.dirname(name) in folders}
        return set(folders), {name: self._content(file, kind) for name, file in reachable.items()}

    @staticmethod
    def _content(file: File, kind: str) -> bytes:
        if kind == "data kept":
            return bytes(file.seen)
        if kind == "torn" and file.last:
            offset, data = file.last
            torn = bytearray(file.safe)
            torn.extend(bytes(max(offset - len(torn), 0)))
            torn[offset : offset + len(data) // 2] = data[: len(data) // 2]
            return bytes(torn)
        return file.safe


KINDS = ("all dropped", "names kept", "torn", "data kept")


def states(log: bytes, path: Path) -> Iterator[tuple[int, Callable[[], None], str]]:
    """For every call and kind: samples acknowledged by then, what puts that state at `path`, and its name."""
    disk = Disk(str(path))
    for number, call in enumerate(calls(log)):
        disk.meet(*call)
        for kind in KINDS:
            folders, files = disk.left(kind)
            yield (
                disk.made,
                lambda folders=folders, files=files: build(path, folders, files),
                f"call {number} ({call[0]} {call[1]}), {kind}",
            )


def build(path: Path, folders: set[str], files: dict[str, bytes]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for folder in sorted(folders):
        os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        if not name.endswith("-shm"):  # SQLite's shared memory does not outlive the power, and is built anew
            Path(name).write_bytes(content)
