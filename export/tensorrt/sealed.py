"""Files sealed with a key of this user: plans and compiled kernels are native code, run only where the seal holds.

Layout: magic, length of the header, header (JSON: facts, notes, size and SHA-256 of the payload), HMAC-SHA-256 over all
of that, payload.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused

MAGIC = b"DDMSEAL1"
KEY_BYTES = 32
SEAL_BYTES = 32
LARGEST_HEADER = 1 << 16
LARGEST_PAYLOAD = 16 << 30
CHUNK = 1 << 24
KEY_VARIABLE = "DATASETDM_PLAN_KEY"  # a key file of one's own choice, for machines that share plans
_START = len(MAGIC) + 4


class Unusable(Exception):
    """A sealed file that must not be used; its text says why, in the words of a sentence that names the file."""


@dataclass(frozen=True)
class Header:
    """What a sealed file says of itself."""

    facts: dict[str, Any]  # what the payload was asked to be
    notes: dict[str, Any]  # what came out beside it
    size: int  # bytes of the payload
    sha256: str


def key_path() -> Path:
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "datasetdm_fast" / "plan.key"


def load_key() -> bytes:
    """The key of this user, made at its first use; refused where others could have read or written it."""
    path = key_path()
    try:
        return _read_key(path)
    except FileNotFoundError:
        _make_key(path)
        return _read_key(path)


def _make_key(path: Path) -> None:
    """A key file that appears whole or not at all; of several processes the first one's stays."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, secrets.token_bytes(KEY_BYTES))
            os.fsync(handle)
        finally:
            os.close(handle)
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
        storage.sync_folder(path.parent)
    except OSError as error:
        raise Missing(
            f"{path}: the key of this machine's plans cannot be written: {error.strerror}",
            f"Name a writable place with {KEY_VARIABLE}.",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _read_key(path: Path) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Refused(
            f"{path}: the key of this machine's plans cannot be read: {error.strerror}",
            "It must be a regular file of your own.",
        ) from error
    try:
        state = os.fstat(handle)
        mode = stat.S_IMODE(state.st_mode)
        remedy = f"Delete {path}: a new key is made, and plans sealed with the old one are rebuilt."
        faults = {
            "is not a regular file of this user's": not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid(),
            f"has the permissions {mode:04o}, expected 0600": mode & 0o077,
            f"has {state.st_size} bytes, expected {KEY_BYTES}": state.st_size != KEY_BYTES,
        }
        for fault, is_there in faults.items():
            if is_there:
                raise Refused(f"{path}: the key of this machine's plans {fault}", remedy)
        return os.read(handle, KEY_BYTES)
    finally:
        os.close(handle)


def write(
    path: Path, facts: Mapping[str, Any], payload: bytes | Path, key: bytes, notes: Mapping[str, Any] | None = None
) -> None:
    """Seals the payload, or the file of that name, under `path`: whole or not at all."""
    size, digest = 0, hashlib.sha256()
    for chunk in _chunks(payload):
        size += len(chunk)
        digest.update(chunk)
    if size > LARGEST_PAYLOAD:
        raise Refused(
            f"{path}: {size} bytes are more than a sealed file holds, {LARGEST_PAYLOAD}",
            "Build for fewer batch sizes, or a smaller image.",
        )
    header = json.dumps(
        asdict(Header(dict(facts), dict(notes or {}), size, digest.hexdigest())), sort_keys=True
    ).encode()
    assert len(header) <= LARGEST_HEADER, "facts too long for a header"
    start = MAGIC + struct.pack("<I", len(header)) + header

    def content() -> Iterator[bytes]:
        yield start + hmac.digest(key, start, "sha256")
        yield from _chunks(payload)

    storage.publish({path: content()})


def _chunks(payload: bytes | Path) -> Iterator[bytes]:
    if isinstance(payload, bytes):
        yield payload
        return
    with payload.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def read(path: Path, key: bytes, facts: Mapping[str, Any] | None = None) -> tuple[Header, bytes]:
    """Header and payload of a sealed file; raises Unusable where the seal does not hold or `facts` differ.

    The payload is returned as the very bytes that were checked: what happens to the file afterwards does not matter.
    """
    with _opened(path) as file:
        header = _read_header(path, file, key)
        if facts is not None and (differing := differences(header.facts, facts)):
            raise Unusable(f"{path} was made for something else ({differing})")
        payload = file.read(header.size)
    if len(payload) != header.size or hashlib.sha256(payload).hexdigest() != header.sha256:
        raise Unusable(f"{path} was edited: its content does not have the digest it was sealed with")
    return header, payload


def read_header(path: Path, key: bytes) -> Header:
    """What a sealed file says of itself, its seal checked and its payload not."""
    with _opened(path) as file:
        return _read_header(path, file, key)


def is_sealed(path: Path) -> bool:
    """Whether a file begins as a sealed one does; whether its seal holds is another question."""
    try:
        with _opened(path) as file:
            return bool(file.read(len(MAGIC)) == MAGIC)
    except (FileNotFoundError, Unusable):
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would make us wait for its writer
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Unusable(f"{path} is not a regular file")
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}") from error


def _read_header(path: Path, file, key: bytes) -> Header:
    whole = os.fstat(file.fileno()).st_size
    start = file.read(_START)
    if len(start) < _START or not start.startswith(MAGIC):
        raise Unusable(f"{path} is foreign: it does not begin as a sealed file does")
    length = struct.unpack("<I", start[len(MAGIC) :])[0]
    if length > LARGEST_HEADER:
        raise Unusable(f"{path} is foreign: its header claims {length} bytes, at most {LARGEST_HEADER} are possible")
    text, seal = file.read(length), file.read(SEAL_BYTES)
    if len(text) < length or len(seal) < SEAL_BYTES:
        raise Unusable(f"{path} is truncated within its header")
    if not hmac.compare_digest(seal, hmac.digest(key, start + text, "sha256")):
        raise Unusable(f"{path} was edited, or sealed with a key that is not {key_path()}")
    header = Header(**json.loads(text))  # sealed, so written by us
    expected = _START + length + SEAL_BYTES + header.size
    if whole != expected:
        fault = "truncated" if whole < expected else "too long"
        raise Unusable(f"{path} is {fault}: {whole} bytes do not fit its header")
    if header.size > LARGEST_PAYLOAD:
        raise Unusable(f"{path} is larger than a sealed file may be: {header.size} bytes")
    return header


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two sets of facts, in words; long values are cut."""
    names = (name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name))
    return "; ".join(f"{name} {_cut(found.get(name))}, expected {_cut(wanted.get(name))}" for name in names)


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else f"{text[:37]}..."
