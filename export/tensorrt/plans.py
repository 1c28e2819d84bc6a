"""Built plans on the disk: each beside a manifest of what it was built for and the digests of its files, and one build
however many processes ask for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.staging import fill_alone, print_line
from datasetdm_fast.untrusted import documents

FORMAT = 2  # of the manifests; another one makes every plan stale
SUFFIX = ".plan"
MANIFEST = ".plan.json"
GOLDEN = ".golden.safetensors"
SUFFIXES = (SUFFIX, MANIFEST, GOLDEN)
REMEDY = "Delete it; it is rebuilt when it is needed."
KEY_LETTERS = 16  # of an order's key in a file name
FILE_NAME = re.compile(rf"(.+-[0-9a-f]{{{KEY_LETTERS}}})({'|'.join(map(re.escape, SUFFIXES))})")
FORM = {  # of a manifest
    "facts": {
        **dict.fromkeys(("stage", "source", "graph", "precision", "flavour", "version", "cuda", "gpu"), str),
        "batch": int,
        "shapes": dict,
        "capabilities": [str],
    },
    "notes": {"layers": int, "fused_attentions": int, "seconds": float},
    "sha256": {SUFFIX: str, GOLDEN: str},
}

Facts = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
Build = Callable[[Path], tuple[dict[str, Any], Arrays]]  # writes the plan; its notes and golden tensors


@dataclass(frozen=True)
class PlanOrder:
    """What a plan is to be: everything that decides its bytes or whether it may run here."""

    stage: str
    batch: int  # images, or texts, per call
    source: str  # digest of model and decoders
    graph: str  # digest of the ONNX graph with its weights
    shapes: Mapping[str, tuple[int, ...]]  # of inputs whose shape a call decides; kernels are chosen for these
    precision: str
    flavour: str
    version: str
    cuda: str
    capabilities: tuple[str, ...]  # of the GPUs it serves; empty for what the flavour calls portable
    gpu: str = ""  # name of the only GPU model it serves, where the flavour binds plans to one
    format: int = field(default=FORMAT)

    def facts(self) -> dict[str, Any]:
        """The order as its manifest holds it."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return facts

    @property
    def name(self) -> str:
        """The name of its files, without a suffix."""
        return plan_name(self.facts())


def plan_name(facts: Facts) -> str:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{facts['stage']}-{key[:KEY_LETTERS]}"


@dataclass(frozen=True)
class PlanFile:
    """A plan whose digest was checked, and the outputs its golden inputs must have."""

    path: Path
    content: bytes
    facts: Facts  # its order
    notes: Mapping[str, Any]  # layers, fused_attentions, seconds
    golden: Arrays  # in.NAME and out.NAME
    is_new: bool = False  # whether it was built just now


class PlanFolder:
    """The plans of one folder."""

    def __init__(self, folder: Path, on_message: Callable[[str], None] = print_line):
        self.folder, self.on_message = Path(folder), on_message

    def path(self, order: PlanOrder) -> Path:
        return self.folder / f"{order.name}{SUFFIX}"

    def open_or_build(
        self, order: PlanOrder, build: Build, accepts: Callable[[Facts], bool] = lambda facts: False
    ) -> PlanFile:
        """The plan of `order`, or one whose facts the caller accepts; one process builds for all that wait."""
        if plan := self._read_usable(order) or self._read_similar(order, accepts):
            return plan
        with fill_alone(self.folder):
            with suppress(Missing, Refused):  # another process may have built it meanwhile
                return self.read(order)
            self._build(order, build)
            return replace(self.read(order), is_new=True)

    def _read_usable(self, order: PlanOrder) -> PlanFile | None:
        if not os.path.lexists(self.path(order)):
            return None
        try:
            return self.read(order)
        except (Missing, Refused) as refusal:
            self.on_message(f"{refusal.cause}; it is rebuilt")
            return None

    def _read_similar(self, order: PlanOrder, accepts: Callable[[Facts], bool]) -> PlanFile | None:
        """A plan that differs from the order only in the GPUs served, which the caller accepts."""
        expected = order.facts()
        for path in sorted(self.folder.glob(f"{order.stage}-*{SUFFIX}")):
            if path == self.path(order) or not FILE_NAME.fullmatch(path.name):
                continue
            try:
                facts = _read_manifest(path)["facts"]
                if facts | {"capabilities": expected["capabilities"]} == expected and accepts(facts):
                    return read_plan(path)
            except (Missing, Refused) as refusal:
                self.on_message(f"{refusal.cause}; it is skipped")
        return None

    def read(self, order: PlanOrder) -> PlanFile:
        """The plan of `order`; raises Missing or Refused with the reason why it cannot be used."""
        return read_plan(self.path(order), order.facts())

    def _build(self, order: PlanOrder, build: Build) -> None:
        from safetensors.numpy import save

        path = self.path(order)
        part = storage.part_of(path)
        try:
            notes, golden = build(part)
            tensors = save(dict(golden))
            digests = {SUFFIX: storage.sha256_of(part), GOLDEN: hashlib.sha256(tensors).hexdigest()}
            manifest = {"facts": order.facts(), "notes": notes, "sha256": digests}
            for suffix in (MANIFEST, SUFFIX):  # no plan is ever beside the manifest of another
                storage.remove(sibling(path, suffix))
            storage.publish({sibling(path, GOLDEN): tensors})
            storage.publish({sibling(path, MANIFEST): json.dumps(manifest, indent=1).encode()})
            storage.move(part, path)
        finally:
            storage.forget(part)


def read_plan(path: Path, expected: Facts | None = None) -> PlanFile:
    """The plan of a file, with the very bytes whose digest was checked; refuses one that is truncated, modified or
    built for something other than `expected`.
    """
    from safetensors.numpy import load

    manifest = _read_manifest(path)
    if differences := [name for name, value in (expected or {}).items() if manifest["facts"].get(name) != value]:
        raise Refused(f"{path}: its manifest has another {', '.join(differences)}", REMEDY)
    content = _read_checked(path, manifest, SUFFIX)
    golden = load(_read_checked(path, manifest, GOLDEN))
    return PlanFile(path, content, manifest["facts"], manifest["notes"], golden)


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """What a plan was built for, its notes and digests; refuses the manifest of another plan."""
    place = sibling(path, MANIFEST)
    if not place.is_file():
        raise Missing(f"{path}: its manifest is missing", REMEDY)
    manifest = documents.read_object(place, remedy=REMEDY)
    try:
        documents.check_form(manifest, FORM)
    except ValueError as error:
        raise Refused(f"{place}: {error}", REMEDY) from None
    if (name := plan_name(manifest["facts"])) != path.name.removesuffix(SUFFIX):
        raise Refused(f"{path}: its manifest is that of another plan, {name}", REMEDY)
    return manifest


def _read_checked(path: Path, manifest: Mapping[str, Mapping[str, Any]], suffix: str) -> bytes:
    place = sibling(path, suffix)
    with storage.refusing(place):
        if not place.is_file():  # a pipe would make us wait for its writer
            raise Refused(f"{place}: there is no such file", REMEDY)
        content = place.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"][suffix]:
        raise Refused(f"{place}: it is truncated or modified, as its digest is not that of its manifest", REMEDY)
    return content


def sibling(path: Path, suffix: str) -> Path:
    """The file of the same plan with this suffix."""
    match = FILE_NAME.fullmatch(path.name)
    assert match, path
    return path.with_name(match[1] + suffix)
