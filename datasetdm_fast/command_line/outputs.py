"""Output paths in flags, checked before anything is loaded."""

from __future__ import annotations

import os
import unicodedata
from itertools import chain
from pathlib import Path

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted.documents import quote

PLACE = "place"  # a folder, or the URL of one in an object store
LONGEST_PART = 255 - 32  # bytes of a name between two slashes, less what a file has added while it is written
LONGEST_PATH = 4096 - 512  # bytes, less those of the files inside


def check_output(flag: str, text: str, kind: str) -> None:
    """Refuses a name that no file or folder can have."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise Refused(f"{flag} {quote(text)}: control characters in the name of a {kind}", "Choose another name.")
    if "://" in text and kind == PLACE:
        return
    if "://" in text:
        raise Refused(
            f"{flag} {quote(text)}: expected a {kind} on this machine, not a URL",
            "Name a path. Object stores are written to by generate --store, convert --out and merge --out.",
        )
    kind = "folder" if kind == PLACE else kind
    path = Path(text)
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > LONGEST_PART or len(os.fsencode(path.absolute())) > LONGEST_PATH:
        raise Refused(
            f"{flag} {quote(text)}: {longest} bytes between two slashes and {len(os.fsencode(text))} in all, "
            f"expected at most {LONGEST_PART} and {LONGEST_PATH}",
            "Choose a shorter name.",
        )
    try:
        _check_place(flag, path, kind)
    except OSError as error:
        raise Missing(
            f"{flag} {text}: {error.strerror}", "Check the folders above it and their permissions."
        ) from error


def _check_place(flag: str, path: Path, kind: str) -> None:
    """Refuses a path that cannot be created, or is something else."""
    for place in chain([path], path.parents):
        if place.is_symlink() and not place.exists():
            raise Refused(f"{flag} {path}: {place} is a symbolic link that leads nowhere", "Repair or delete the link.")
    if path.exists():
        if path.is_dir() != (kind == "folder") or not (path.is_dir() or path.is_file()):
            kind_there = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"
            raise Refused(
                f"{flag} {path}: there is {kind_there} of that name, expected a {kind}", f"Choose another {flag}."
            )
        return
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise Refused(f"{flag} {path}: {above} is a file, expected a folder", f"Choose another {flag}.")
    if not os.access(above, os.W_OK | os.X_OK) or not os.statvfs(above).f_blocks:  # /proc and /sys take no files
        raise Missing(f"{flag} {path}: {above} cannot be written to", "Check its permissions, or choose another.")
