"""Built plans on the disk: what each is for, its seal, and one build however many processes ask for it."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.disk.locks import cache_folder
from datasetdm_fast.errors import Missing
from datasetdm_fast.export.staging import say, take_lock
from datasetdm_fast.export.tensorrt import sealed
from datasetdm_fast.export.tensorrt.sealed import Unusable

FORMAT = 1  # of the facts below; another one makes every plan stale
SUFFIX = ".plan"
GOLDEN = ".golden.safetensors"
COMPILED = ".compiled"  # the kernels TensorRT-RTX made of a plan for one GPU
LARGEST_GOLDEN = 256 << 20
SHOWN_KEY = 16  # characters of a key in a file name
OWN_NAME = re.compile(rf".+-[0-9a-f]{{{SHOWN_KEY}}}({'|'.join(map(re.escape, (SUFFIX, GOLDEN, COMPILED)))})")
FLEXIBLE = ("profiles", "capabilities", "flags")  # facts in which a plan may differ from an order and still do


@dataclass(frozen=True)
class PlanOrder:
    """What a plan is to be: everything that decides its bytes or whether it may run here."""

    stage: str
    source: str  # digest of model and decoders
    graph: str  # digest of the ONNX graph with its weights
    # per profile: input -> least, usual and largest shape
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]
    precision: str
    flavour: str
    version: str
    cuda: str
    capabilities: tuple[str, ...]  # of the GPUs it serves; empty for what the flavour calls portable
    flags: tuple[str, ...] = ()
    gpu: str = ""  # name of the only GPU model it serves, where the flavour binds plans to one
    format: int = field(default=FORMAT)

    def facts(self) -> dict[str, Any]:
        """The order as JSON gives it back."""
        return json.loads(json.dumps(asdict(self)))

    @property
    def key(self) -> str:
        return key_of(self.facts())


def key_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PlanFile:
    """A plan whose seal was checked, and what it is to say of its golden inputs."""

    path: Path
    content: bytes
    facts: Mapping[str, Any]  # its order
    notes: Mapping[str, Any]  # layers, fused_attentions, seconds, golden
    golden: Mapping[str, np.ndarray]  # in.NAME and out.NAME
    is_new: bool = False  # whether it was built just now


@dataclass(frozen=True)
class Entry:
    """One file of a plan folder."""

    path: Path
    size: int
    facts: Mapping[str, Any]
    notes: Mapping[str, Any]
    fault: str  # why it would not be used; empty for a good one


Build = Callable[[Path], tuple[dict[str, Any], Mapping[str, "np.ndarray"]]]


class PlanFolder:
    """The plans of one folder, read and written under this user's key."""

    def __init__(self, folder: Path, tell: Callable[[str], None] = say):
        self.folder, self.tell, self.key = Path(folder), tell, sealed.load_key()

    def path(self, order: PlanOrder) -> Path:
        return self.folder / f"{order.stage}-{order.key[:SHOWN_KEY]}{SUFFIX}"

    def open_or_build(
        self, order: PlanOrder, build: Build, accepts: Callable[[Mapping[str, Any]], bool] = lambda facts: False
    ) -> PlanFile:
        """The plan of `order`, or one whose facts are `accept`ed; one process builds for all that wait."""
        plan = self._in_place(order) or self._other(order, accepts)
        if plan:
            return plan
        storage.make_folder(self.folder)
        waits = f"{order.stage}: another process builds this plan, waiting for it"
        with lock(self.path(order).with_suffix(".lock"), lambda: self.tell(waits)):
            with suppress(FileNotFoundError, Unusable):  # another process may have built it meanwhile
                return self.read(order)
            self._build(order, build)
            return replace(self.read(order), is_new=True)

    def _in_place(self, order: PlanOrder) -> PlanFile | None:
        try:
            plan = self.read(order)
        except FileNotFoundError:
            return None
        except Unusable as refusal:
            self.tell(f"{refusal}; it is not loaded but rebuilt")
            return None
        with suppress(OSError):  # a folder of others may be read-only
            os.utime(plan.path)
        return plan

    def _other(self, order: PlanOrder, accepts: Callable[[Mapping[str, Any]], bool]) -> PlanFile | None:
        """A plan that differs from the order only in what the caller accepts: shapes, GPUs served, builder flags."""
        wanted = order.facts()
        for path in sorted(self.folder.glob(f"{order.stage}-*{SUFFIX}")):
            if path == self.path(order):
                continue
            try:
                facts = sealed.read_header(path, self.key).facts
                if all(facts.get(name) == wanted[name] for name in wanted if name not in FLEXIBLE) and accepts(facts):
                    return self._read(path, facts)
            except (FileNotFoundError, Unusable) as refusal:
                self.tell(f"{refusal}; it is passed over")
        return None

    def read(self, order: PlanOrder) -> PlanFile:
        """The plan of `order`; raises FileNotFoundError, or Unusable with the reason."""
        return self._read(self.path(order), order.facts())

    def _read(self, path: Path, facts: Mapping[str, Any]) -> PlanFile:
        header, content = sealed.read(path, self.key, facts)
        return PlanFile(path, content, header.facts, header.notes, self._read_golden(path, header))

    def _read_golden(self, path: Path, header: sealed.Header) -> dict[str, np.ndarray]:
        from safetensors.numpy import load

        expected, beside = header.notes["golden"], golden_path(path)
        if not beside.is_file() or beside.stat().st_size > LARGEST_GOLDEN:
            raise Unusable(f"{path} lacks its golden output {beside.name}")
        content = beside.read_bytes()
        if hashlib.sha256(content).hexdigest() != expected:
            raise Unusable(f"{beside} was edited: it does not have the digest its plan was sealed with")
        return load(content)

    def _build(self, order: PlanOrder, build: Build) -> None:
        from safetensors.numpy import save

        path = self.path(order)
        # Of a process that was killed; nobody else writes this plan now.
        for leftover in self.folder.glob(f".{path.stem}.*.part"):
            leftover.unlink(missing_ok=True)
        part = path.with_name(f".{path.name}.raw.{os.getpid()}.part")
        try:
            notes, golden = build(part)
            content = save(dict(golden))
            storage.publish({golden_path(path): content})
            sealed.write(path, order.facts(), part, self.key, notes | {"golden": hashlib.sha256(content).hexdigest()})
        finally:
            part.unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        """Every plan file with what it was built for, seal and content checked; other programs' files of this suffix
        are left out.
        """
        found = []
        for path in filter(is_own, sorted(self.folder.glob(f"*{SUFFIX}"))):
            facts, notes, fault = {}, {}, ""
            try:
                header, _ = sealed.read(path, self.key)
                facts, notes = header.facts, header.notes
                if path.name != f"{facts['stage']}-{key_of(facts)[:SHOWN_KEY]}{SUFFIX}":
                    found_there = f"it is {facts['stage']} of graph {facts['graph'][:12]}"
                    raise Unusable(f"{path} carries another plan's name: {found_there}")
                self._read_golden(path, header)
            except FileNotFoundError:
                fault = f"{path} is a link to nothing"
            except Unusable as refusal:
                fault = str(refusal)
            found.append(Entry(path, path.lstat().st_size, facts, notes, fault))
        return found


def prune(
    folders: Iterable[tuple[PlanFolder, Callable[[Mapping[str, Any]], str]]], cap: int, *, is_dry: bool = False
) -> list[tuple[Path, str]]:
    """What was deleted and why: unusable plans, those that the function beside their folder calls stale, stray files,
    then the least used of all folders together beyond `cap` bytes; a dry run only tells.
    """
    removed: list[tuple[Path, str]] = []
    good: list[Entry] = []
    orphans: list[Path] = []
    for opened, is_stale in folders:
        for entry in opened.entries():
            if reason := entry.fault or is_stale(entry.facts):
                removed.append((entry.path, reason))
            else:
                good.append(entry)
        names = {of(path) for path in opened.folder.glob(f"*{SUFFIX}") for of in (golden_path, compiled_path)}
        beside = {path for suffix in (GOLDEN, COMPILED) for path in opened.folder.glob(f"*{suffix}")}
        orphans += filter(is_own, sorted(beside - names))
    total = 0
    for entry in sorted(good, key=lambda entry: entry.path.stat().st_mtime, reverse=True):
        total += entry.size
        if total > cap:
            removed.append((entry.path, f"beyond the {cap} bytes that are kept"))
    of_plans = [(path, golden_path(path), compiled_path(path), path.with_suffix(".lock")) for path, _ in removed]
    for one in () if is_dry else (*chain(*of_plans), *orphans):
        with storage.refusing(one):
            one.unlink(missing_ok=True)
    return removed + [(orphan, "belongs to no plan") for orphan in orphans]


def is_own(path: Path) -> bool:
    """Whether a file has a name that this module gives, or is sealed: a user's own x.plan is neither."""
    return bool(OWN_NAME.fullmatch(path.name)) or sealed.is_sealed(path)


def cached_plans() -> Path:
    """The folder of the cache with a folder of plans for each model, its decoders, precision and size."""
    return cache_folder() / "engines"


def golden_path(plan: Path) -> Path:
    return plan.with_name(plan.name.removesuffix(SUFFIX) + GOLDEN)


def compiled_path(plan: Path) -> Path:
    return plan.with_suffix(COMPILED)


@contextmanager
def lock(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file for this process, waiting for whoever has it; `waits` is called once if it must wait."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Missing(f"{path}: {error.strerror}", "Check the folder and its permissions.") from error
    try:
        try:
            take_lock(handle, waits)
        except OSError as error:
            raise Missing(
                f"{path}: the file system cannot lock files ({error.strerror})", "Choose a folder on a local disk."
            ) from error
        yield
    finally:
        os.close(handle)
