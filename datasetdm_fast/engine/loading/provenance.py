"""Digests and licences of model files."""

import hashlib
import re
from pathlib import Path

UNKNOWN_LICENCE = "unknown: ask the model's owner"


def files_of(folder: Path) -> list[Path]:
    """The files of a folder, without the hidden ones that file managers leave."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def digest(files: list[Path]) -> str:
    """SHA-256 over the contents of `files` in order."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return f"sha256:{total.hexdigest()}"


def drawable_things(folder: Path) -> tuple[str, ...]:
    """What the card of a model folder lists that the model can draw, as `draws: [ball, cube]`; empty without a list."""
    listed = re.search(r"^draws:\s*\[(.*)\]\s*$", _front_matter(folder), re.MULTILINE)
    return tuple(filter(None, (word.strip().strip("\"'") for word in listed[1].split(",")))) if listed else ()


def folder_licence(folder: Path) -> str:
    """Licence text of a model folder, else the licence its card names, else a line saying that it is unknown."""
    texts = sorted(
        path for path in folder.iterdir() if path.is_file() and path.stem.upper() in ("LICENSE", "LICENCE", "COPYING")
    )
    if texts:
        return texts[0].read_text(encoding="utf-8", errors="replace").strip()
    named = dict(re.findall(r"^(licen[sc]e(?:_name)?):\s*(\S.*)$", _front_matter(folder), re.MULTILINE))
    name: str = named.get("licence") or named.get("license") or UNKNOWN_LICENCE
    return (named.get("license_name", name) if name == "other" else name).strip().strip("\"'")


def _front_matter(folder: Path) -> str:
    """The YAML at the head of a folder's card, empty where there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return front[1] if front else ""
