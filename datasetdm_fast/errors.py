"""The three exceptions with which a command ends; each carries the cause, the remedy and the exit code."""

import errno
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class Stop(Exception):
    exit_code = 1

    def __init__(self, cause: str, remedy: str):
        super().__init__(cause, remedy)
        self.cause, self.remedy = cause, remedy

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}"


class Refused(Stop, ValueError):
    """Bad input or usage."""

    exit_code = 2


class Missing(Stop, RuntimeError):
    """Something needed is not there: weights, an engine, a GPU, a library, disk space, a permission."""

    exit_code = 3


class Unanswered(Missing):
    """A store did not answer, which says nothing about its files."""


class GateFailed(Stop, RuntimeError):
    """The work was done, but a check on it failed or samples were quarantined."""

    exit_code = 4


def is_out_of_gpu(error: BaseException) -> bool:
    """Whether memory of a GPU ran out, for PyTorch, or for CUDA, which takes some for every kernel and graph."""
    is_of_torch = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and (is_of_torch or "out of memory" in str(error))


def is_out_of_ram(error: BaseException) -> bool:
    """Whether the machine's memory ran out, for Python, NumPy or PyTorch, which raises a RuntimeError, or a mapping."""
    texts = ("DefaultCPUAllocator", os.strerror(errno.ENOMEM))
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def quote(path: object) -> str:
    """A path as a shell and a command read it, for a remedy that is a command."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


@contextmanager
def refusing_form(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Within the block, what is wrong with the form of a file becomes a refusal with this remedy."""
    try:
        yield
    except Refused as stop:
        raise Refused(stop.cause, remedy) from stop
    except ValueError as error:
        raise Refused(f"{path}: not a valid {what} file ({error})", remedy) from error


@contextmanager
def renamed_flags(names: Mapping[str, str]) -> Iterator[None]:
    """Within the block, refusals call a flag as the command line does that was given: `names` are ours -> those."""
    try:
        yield
    except Stop as stop:
        cause, remedy = stop.args
        for ours, theirs in names.items():
            cause, remedy = (re.sub(rf"{ours}(?![\w-])", theirs, text) for text in (cause, remedy))
        raise type(stop)(cause, remedy) from stop


def check_choice(name: str, value: object, known: Collection[str], remedy: str = "Choose one of these.") -> None:
    """Refuses a value of the setting `name` that is none of the known ones."""
    if not isinstance(value, str) or value not in known:
        raise Refused(f"{name}: {value!r} is none of {', '.join(known)}{nearest(value, known)}", remedy)


def nearest(word: object, known: Collection[str], before: str = "") -> str:
    """' (did you mean X?)' where a known word starts like this one or is close to it, `before` put before X. Spaces and
    capitals make no difference.

    >>> nearest("sede", ("seed", "size"), before="--")
    ' (did you mean --seed?)'
    >>> nearest("Ball ", ("wall", "ball"))
    ' (did you mean ball?)'
    >>> nearest("dem", ("demo2", "demo"))
    ' (did you mean demo?)'
    """
    import difflib

    if not isinstance(word, str):
        return ""
    plain, words = word.strip().casefold(), {candidate.casefold(): candidate for candidate in known}
    longer = [candidate for candidate in words if plain and candidate.startswith(plain)]
    close = sorted(longer, key=len) or difflib.get_close_matches(plain, list(words), n=1, cutoff=0.6)
    return f" (did you mean {before}{words[close[0]]}?)" if close else ""
