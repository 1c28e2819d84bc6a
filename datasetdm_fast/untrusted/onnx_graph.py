"""ONNX graphs of unknown origin: operators, domains and files they point to are checked without loading the graph."""

import mmap
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted.documents import DEEPEST, GET_AGAIN, LONGEST_NAME, check_inside, quoted

LARGEST_ONNX = 2**31 - 1  # bytes of the graph itself, protobuf's own limit
MOST_NODES = 2_000_000  # messages of one ONNX graph
DOMAINS = ("", "ai.onnx", "com.microsoft")
NATIVE = ("EPContext",)  # nodes that make a runtime load compiled code from a file


@dataclass
class _Graph:
    external: list[dict[str, str]] = field(default_factory=list)
    nodes: list[tuple[str, str]] = field(default_factory=list)  # domain, operator
    own: set[str] = field(default_factory=set)  # domains of functions the file itself defines
    opsets: dict[str, int] = field(default_factory=dict)
    messages: int = 0


def check_onnx(path: Path, *, domains: Sequence[str] = DOMAINS) -> list[Path]:
    """The data files of an ONNX file, all inside its folder; a graph unfit for onnx or a runtime is refused."""
    with storage.refusing(path):
        size = path.stat().st_size
        if not 0 < size <= LARGEST_ONNX:
            raise Refused(
                f"{path}: {size} bytes, expected an ONNX graph of at most {LARGEST_ONNX}",
                "Keep large tensors in external data.",
            )
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        graph = _walk(data)
    except _Malformed as error:
        raise Refused(f"{path}: not an ONNX file ({error})", GET_AGAIN) from error
    if not graph.opsets:
        raise Refused(f"{path}: not an ONNX file (it names no operator set)", GET_AGAIN)
    for domain, operator in graph.nodes:
        if domain not in domains and domain not in graph.own:
            raise Refused(
                f"{path}: the operator {quoted(operator)} of {quoted(domain)} is not supported",
                "Export the model without custom operators.",
            )
        if operator in NATIVE:
            raise Refused(
                f"{path}: the operator {operator} would load compiled code from a file",
                "Export the model anew on this machine.",
            )
    return list(dict.fromkeys(_beside(path, entry) for entry in graph.external))


def _beside(path: Path, entry: Mapping[str, str]) -> Path:
    """The data file an external tensor names, if it is a plain file within the folder that holds as many bytes."""
    location = entry.get("location", "")
    try:
        name = check_inside(location)
        offset, length = int(entry.get("offset", "0")), int(entry.get("length", "0"))
    except ValueError as error:
        raise Refused(f"{path}: external data {error}", "Keep the data in files beside the graph.") from error
    file = path.parent
    for part in PurePosixPath(name).parts:
        file = file / part
        if file.is_symlink():
            raise Refused(
                f"{path}: external data {quoted(location)} is reached through a link",
                "Keep the data in files beside the graph.",
            )
    try:
        found = file.lstat()
    except OSError as error:
        raise Refused(f"{path}: external data {quoted(location)} is not there ({error.strerror})", GET_AGAIN) from error
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise Refused(
            f"{path}: external data {quoted(location)} is not a regular file of its own",
            "Copy the file instead of linking it.",
        )
    if offset < 0 or length < 0 or offset + length > found.st_size:
        raise Refused(
            f"{path}: external data {quoted(location)} has {found.st_size} bytes, the graph asks for {offset} + "
            f"{length}",
            GET_AGAIN,
        )
    return file


class _Malformed(ValueError):
    pass


def _walk(data: memoryview) -> _Graph:
    graph = _Graph()
    # kind of message and nesting beside each, as graphs may lie in nodes in graphs
    waiting: list[tuple[Mapping[int, Callable[[_Graph, memoryview], None] | str], memoryview, int]] = [
        (_FORMS["model"], data, 0)
    ]
    while waiting:
        form, message, depth = waiting.pop()
        if depth > DEEPEST:
            raise _Malformed(f"graphs nested more than {DEEPEST} deep")
        graph.messages += 1
        if graph.messages > MOST_NODES:
            raise _Malformed(f"more than {MOST_NODES} parts")
        if gather := form.get(0):
            gather(graph, message)
        for number, value in _fields(message):
            if isinstance(inner := form.get(number), str) and isinstance(value, memoryview):
                waiting.append((_FORMS[inner], value, depth + 1))
    return graph


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: number, and its bytes or its integer."""
    place, end = 0, len(message)
    while place < end:
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if not number:
            raise _Malformed("a field without a number")
        if wire == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(message, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Malformed(f"a field of the unknown kind {wire}")
        if length > end - place:
            raise _Malformed("a field that reaches beyond its message")
        yield number, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for k in range(10):
        if place + k >= len(message):
            raise _Malformed("cut off inside a number")
        byte = message[place + k]
        value |= (byte & 0x7F) << 7 * k
        if byte < 0x80:
            return value, place + k + 1
    raise _Malformed("a number of more than ten bytes")


def _text(message: memoryview, number: int) -> str:
    """The last text of a field, as protobuf readers take it."""
    found = [value for key, value in _fields(message) if key == number and isinstance(value, memoryview)]
    if not found:
        return ""
    if len(found[-1]) > LONGEST_NAME:
        raise _Malformed("a name that is too long")
    try:
        return bytes(found[-1]).decode()
    except UnicodeDecodeError as error:
        raise _Malformed("a name that is no UTF-8") from error


def _gather_opset(graph: _Graph, message: memoryview) -> None:
    graph.opsets[_text(message, 1)] = next(
        (value for key, value in _fields(message) if key == 2 and isinstance(value, int)), 0
    )


def _gather_node(graph: _Graph, message: memoryview) -> None:
    graph.nodes.append((_text(message, 7), _text(message, 4)))


def _gather_function(graph: _Graph, message: memoryview) -> None:
    graph.own.add(_text(message, 10))


def _gather_tensor(graph: _Graph, message: memoryview) -> None:
    entries = [value for key, value in _fields(message) if key == 13 and isinstance(value, memoryview)]
    if entries:
        graph.external.append({_text(entry, 1): _text(entry, 2) for entry in entries})


# field number -> the form of the message in it; under 0, what is gathered of the message itself
_FORMS: dict[str, Mapping[int, Callable[[_Graph, memoryview], None] | str]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "opset": {0: _gather_opset},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {0: _gather_function, 7: "node", 9: "opset", 11: "attribute"},
    "node": {0: _gather_node, 5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {0: _gather_tensor},
}
