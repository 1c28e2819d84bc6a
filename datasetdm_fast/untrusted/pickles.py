"""Pickled checkpoints (.ckpt, .pth, .bin) are programs: a confined process turns each once into safetensors."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.tensors import check_safetensors

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_CHECKPOINT = 32 * 2**30  # bytes of one checkpoint
SPARE_MEMORY = 2 * 2**30  # bytes beyond three times the file
SPARE_FILE = 16 * 2**20  # bytes of a header beyond twice the file
SPARE_SECONDS = 120  # of processor time, beyond one for every 20 MB
MOST_OTHERS = 32  # names of entries that are no tensors
OTHERS = "left out"  # the note of a safe copy that holds them
MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
TRAINER = ("pytorch_lightning.", "lightning.")  # objects of the original checkpoints that are not needed
CONVERT = "If you trust it, convert it to .safetensors, or get the .safetensors file of the same model."


def safe_copy(path: Path) -> Path:
    """The cached safetensors copy of a pickled checkpoint, made at the first call by a confined process."""
    size = _check_beginning(path)
    target = storage.cache_folder() / "converted" / f"{storage.sha256_of(path)}.safetensors"
    if target.exists():
        with suppress(Refused):  # a damaged copy is made anew
            check_safetensors(target)
            return target
    storage.make_folder(target.parent)
    for left in target.parent.glob(".*.part"):  # by a process that was killed
        if not Path(f"/proc/{left.name.split('.')[-2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    desk = target.with_name(f".{target.name}.{os.getpid()}.part")
    storage.make_folder(desk)
    try:
        _run(path, desk / target.name, size)
        check_safetensors(desk / target.name)
        storage.move(desk / target.name, target)
    finally:
        shutil.rmtree(desk, ignore_errors=True)
    return target


def _check_beginning(path: Path) -> int:
    """Size of a file that begins as a checkpoint does, and whose archive holds plain members of honest size."""
    with storage.refusing(path), path.open("rb") as file:
        size, beginning = path.stat().st_size, file.read(4)
    if size > LARGEST_CHECKPOINT:
        raise Refused(f"{path}: {size} bytes, at most {LARGEST_CHECKPOINT} are read", CONVERT)
    if not beginning.startswith(MAGIC):
        raise Refused(
            f"{path} is truncated or not a checkpoint, as it begins with neither an archive nor a pickle",
            documents.GET_AGAIN,
        )
    if beginning.startswith(b"PK"):
        documents.zip_members(path, most_bytes=size)
    return size


def _run(source: Path, target: Path, size: int) -> None:
    paths = [entry for entry in sys.path if os.path.isabs(entry)]
    call = f"child({str(source.resolve())!r}, {str(target.resolve())!r})"
    code = f"import sys; sys.path[:] = {paths!r}; from datasetdm_fast.untrusted.pickles import child; {call}"
    inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    environment = {
        "PATH": os.defpath,
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    } | inherited
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            cwd="/",
            timeout=4 * _seconds(size),
        )
    except subprocess.TimeoutExpired:
        raise Refused(
            f"{source}: reading it took longer than {4 * _seconds(size)} seconds, so it was stopped", CONVERT
        ) from None
    except OSError as error:
        raise Missing(
            f"{source}: no process could be started to read it ({error.strerror})",
            "Free memory and processes, then try again.",
        ) from error
    try:
        result = json.loads(ended.stdout)
    except ValueError:
        how = signal.Signals(-ended.returncode).name if ended.returncode < 0 else f"code {ended.returncode}"
        last = (ended.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
        raise Refused(
            f"{source}: the process that read it ended with {how} {documents.quote(last) if last else ''}".rstrip(),
            CONVERT,
        ) from None
    if result["lacking"]:
        print(
            f"{source}: read without {' and '.join(result['lacking'])}, which this system does not offer",
            file=sys.stderr,
        )
    if result["cause"]:
        raise Refused(
            f"{source} is truncated, or a pickle that holds more than tensors, which could run code and is not read "
            f"({documents.one_line(result['cause'])})",
            CONVERT,
        )


def _seconds(size: int) -> int:
    return SPARE_SECONDS + size // 20_000_000


# In the process that reads --------------------------------------------------------------------------------------------
def child(source: str, target: str) -> None:
    """Writes the copy, and on stdout as JSON the cause of a failure and the protections that the system lacks."""
    missing = leave_network()
    import torch  # noqa: F401 - before the limits, which bound the untrusted file alone

    missing += confine(Path(target), os.stat(source).st_size)
    try:
        cause = ""
        _save(*read_tensors(Path(source)), Path(target))
    except BaseException as error:  # untrusted bytes make the reader raise nearly anything
        cause = _cause(error)
    print(json.dumps({"cause": cause, "lacking": missing}), flush=True)
    os._exit(0)  # nothing a file left behind gets a chance to run at exit


def _cause(error: BaseException) -> str:
    """The line of torch's message that names the cause."""
    text = str(error).strip() or type(error).__name__
    if match := re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", text):
        return f"it asks for {match[1]}"
    match = re.search(r"WeightsUnpickler error: (.+)", text)
    return match[1] if match else re.sub(r"Weights only load failed.*?\n\n+", "", text, flags=re.DOTALL).splitlines()[0]


def read_tensors(source: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a pickled checkpoint by name, read by torch's restricted reader, and the names of other entries,
    which are left out.
    """
    import torch

    is_archive = zipfile.is_zipfile(source)
    if is_archive:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(source))
        unknown = [name for name in names if not name.startswith(TRAINER)]
        if unknown:
            raise ValueError(f"it asks for {', '.join(sorted(unknown)[:3])}")
        torch.serialization.add_safe_globals([(type("Left", (), {"__module__": "left"}), name) for name in names])
    loaded: Any = torch.load(source, map_location="cpu", weights_only=True, mmap=is_archive)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds a {type(loaded).__name__}, expected a state dict of tensors")
    extra = [name for name in loaded if name != "state_dict"] if "state_dict" in loaded else []
    loaded = loaded.get("state_dict", loaded)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"its state_dict is a {type(loaded).__name__}, expected tensors by name")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not all(isinstance(name, str) and name != "__metadata__" for name in tensors):
        raise ValueError("the names of its tensors are no texts")
    others = [*extra, *(name for name in loaded if name not in tensors)]
    return tensors, [documents.one_line(str(name)) for name in others[:MOST_OTHERS]]


def _save(tensors: Mapping[str, Tensor], others: list[str], target: Path) -> None:
    from safetensors.torch import save_file

    seen: set[int] = set()
    whole = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        is_alone = value.is_contiguous() and place not in seen and value.untyped_storage().nbytes() == value.nbytes
        whole[name] = value.detach() if is_alone else value.detach().contiguous().clone()
        seen.add(place)
    save_file(whole, target, {OTHERS: json.dumps(others)})


_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_LANDLOCK = (444, 445, 446)  # the same numbers on every architecture
_WRITE_FILE, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
_CHANGES = sum(1 << k for k in (0, 1, *range(4, 13)))  # every right, that to start programs too, but not that to read
FORBIDDEN = tuple(  # beginnings of audit events
    "os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty os.remove os.rename os.rmdir os.mkdir os.link "
    "os.symlink os.chmod os.chown os.truncate os.kill subprocess.Popen pty.spawn shutil. socket. urllib. webbrowser. "
    "ftplib. smtplib.".split()
)


def leave_network() -> list[str]:
    """Leaves the network for good and dies with its parent; returns the protections that the system lacks."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return [] if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0 else ["a network namespace of its own"]


def confine(target: Path, size: int) -> list[str]:
    """Bounds memory, time and files by the file's size; forbids programs and every file but one beside `target`."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: used + 3 * size + SPARE_MEMORY,
        resource.RLIMIT_CPU: _seconds(size),
        resource.RLIMIT_FSIZE: 2 * size + SPARE_FILE,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    missing = [] if _landlock(target.parent) else ["a lock on other files"]
    sys.addaudithook(_refuse_event)
    return missing


def _landlock(folder: Path) -> bool:
    """Whether the kernel now lets this process write into `folder` only, and start no program."""
    create, add, restrict = _LANDLOCK
    libc = ctypes.CDLL(None)
    version = libc.syscall(create, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    truncate = _TRUNCATE if version >= 3 else 0
    handled = (ctypes.c_uint64 * 2)(_CHANGES | truncate, 3 if version >= 4 else 0)  # files; then connections
    rules = libc.syscall(create, handled, ctypes.c_size_t(16 if version >= 4 else 8), ctypes.c_uint32(0))
    if rules < 0:
        return False
    handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        allowed = struct.pack("=QI", _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | truncate, handle)
        done = libc.syscall(add, rules, 1, allowed, ctypes.c_uint32(0)) == 0
        return done and libc.syscall(restrict, rules, ctypes.c_uint32(0)) == 0
    finally:
        os.close(handle)
        os.close(rules)


def _refuse_event(event: str, arguments: tuple[Any, ...]) -> None:
    """A second barrier, in Python itself: an audit hook that names the event a pickle tried."""
    is_writing = event == "open" and (
        (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(str(arguments[1] or "r")) & set("wax+")
    )
    if is_writing or event.startswith(FORBIDDEN):
        raise PermissionError(f"it tried {event}")
