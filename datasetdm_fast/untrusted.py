"""Foreign files: size first, then the magic bytes, then bounds, then the form; what does not hold is refused in one sentence before it is used."""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused

if TYPE_CHECKING:
    import xml.etree.ElementTree as ElementTree

    from PIL import Image

LARGEST_JSON = 512 * 2**20  # bytes; COCO's largest annotation file has 470 MB
LARGEST_CONFIG = 2**20  # bytes of one config.json, run.json or the like
LARGEST_YAML = 64 * 2**10
LARGEST_XML = 2**20
LARGEST_IMAGE_FILE = 64 * 2**20
LARGEST_ONNX = 2**31 - 1  # bytes of the graph itself, protobuf's own limit
LARGEST_HEADER = 16 * 2**20  # bytes of a safetensors header
MOST_TENSORS = 20_000
MOST_PIXELS = 2**24  # of one image: 4096 x 4096
MOST_MEMBERS = 20_000  # of one zip archive
MOST_NODES = 2_000_000  # messages of one ONNX graph
DEEPEST = 32  # nested lists, objects, elements or graphs
LONGEST_NAME = 1024
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8},
}
GET_AGAIN = "Get the file again and compare its checksum."


def check_inside(name: str) -> str:
    """The name itself where it is a plain relative path, which cannot lead out of its folder; a ValueError otherwise."""
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or re.search(r"[\x00-\x1f\x7f\\:]", name):
        raise ValueError(f"{shown(name)} is no plain relative path")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or not parts:
        raise ValueError(f"{shown(name)} leads out of its folder")
    return name


def plain(text: str) -> str:
    """A foreign sentence for a message: one line, bounded, and nothing in it can steer a terminal."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in (line if len(line) <= 400 else line[:397] + "..."))


def shown(value: Any) -> str:
    """A foreign value for a message: short, in quotes, and nothing in it can steer a terminal."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_form(value: Any, form: Any, name: str = "") -> None:
    """A ValueError where a JSON value has not the form: a type, [form of every item], or {key: form} for at least these keys."""
    if isinstance(form, type):
        kinds = (int, float) if form is float else (form,)
        holds = isinstance(value, kinds) and (form is bool or not isinstance(value, bool)) and not (isinstance(value, float) and not math.isfinite(value))
        wanted = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list", bool: "true or false"}[form]
    else:
        holds, wanted = isinstance(value, type(form)), "an object" if isinstance(form, dict) else "a list"
    if not holds:
        raise ValueError(f"{name or 'it'} is {shown(value)}, expected {wanted}")
    if isinstance(form, list):
        for k, item in enumerate(value):
            check_form(item, form[0], f"{name}[{k}]")
    elif isinstance(form, dict):
        for key, inner in form.items():
            check_form(value.get(key), inner, f"{name}.{key}" if name else key)


# JSON, YAML, XML --------------------------------------------------------------------------------------------------------------------


def read_json(path: Path, *, most: int = LARGEST_CONFIG) -> Any:
    """The value of a JSON file."""
    return parse_json(storage.read(path, most), str(path))


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text; `name` is how messages call it. Repeated keys, NaN and deep nesting are refused, as readers differ about them."""
    try:
        value = json_decoder().decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: not readable as JSON ({_reason(error)})", GET_AGAIN) from error
    if _depth(value) > DEEPEST:
        raise Refused(f"{name}: nested more than {DEEPEST} deep", GET_AGAIN)
    return value


def json_decoder() -> json.JSONDecoder:
    """A decoder that refuses repeated keys and NaN."""
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        raise ValueError(f"the key {shown(next(key for key, _ in pairs if key in seen or seen.add(key)))} is there twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())]
        depth += 1
    return depth


def read_object(path: Path, *, most: int = LARGEST_CONFIG) -> dict[str, Any]:
    """The object in a JSON file, such as a config.json."""
    value = read_json(path, most=most)
    if not isinstance(value, dict):
        raise Refused(f"{path}: holds a JSON {type(value).__name__}, expected an object", GET_AGAIN)
    return value


def read_yaml(path: Path) -> Any:
    """The value of a YAML file of plain values; anchors, aliases and tags are refused."""
    import yaml  # only a run with --config needs it

    class Plain(yaml.SafeLoader):
        deep = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read", event.start_mark)
            if getattr(event, "tag", None):
                raise yaml.composer.ComposerError(None, None, "tags are not read", event.start_mark)
            self.deep += 1
            if self.deep > DEEPEST:
                raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", event.start_mark)
            node = super().compose_node(parent, index)
            self.deep -= 1
            return node

    data = storage.read(path, LARGEST_YAML)
    try:
        return yaml.load(data.decode("utf-8-sig"), Loader=Plain)
    except Exception as error:  # a value such as 2001-99-99 makes PyYAML raise whatever the value's type raises
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise Refused(f"{path} is not valid YAML{place} ({_reason(error)})", "Write one `name: value` per line, UTF-8.") from error


def read_xml(path: Path) -> ElementTree.Element:
    """The root element of an XML file; a document type, and with it every entity, is refused."""
    import xml.etree.ElementTree as ElementTree
    from xml.parsers import expat

    builder, parser, depth = ElementTree.TreeBuilder(), expat.ParserCreate(), 0

    def refuse(*_: Any) -> NoReturn:
        raise ValueError("it declares a document type or an entity")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.ExternalEntityRefHandler = refuse
    data = storage.read(path, LARGEST_XML)
    try:
        parser.Parse(data, True)
        return builder.close()
    except (ValueError, LookupError, expat.ExpatError, AssertionError) as error:  # LookupError: an encoding that does not exist
        raise Refused(f"{path}: not readable as XML ({_reason(error)})", GET_AGAIN) from error


def _reason(error: BaseException) -> str:
    text = getattr(error, "problem", None) or " ".join(str(error).split())
    return (text or type(error).__name__)[:160]


# Images and archives ----------------------------------------------------------------------------------------------------------------


def read_image(path: Path, *, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """The decoded image of a whole PNG or JPEG file; its size is checked before a pixel is."""
    return decode_image(storage.read(path, LARGEST_IMAGE_FILE), str(path), most_pixels=most_pixels)


def decode_image(data: bytes, name: str, *, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """The same for bytes in memory."""
    from PIL import Image

    if not data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        raise Refused(f"{name}: neither a PNG nor a JPEG file", "Convert it to PNG or JPEG, or get it again.")
    try:
        if data.startswith(b"\x89PNG"):
            check_png(data, may_go_on=True)  # Pillow fills up one that was cut off near its end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large is refused below, in one sentence
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        width, height = image.size
        if width * height > most_pixels:
            raise ValueError(f"{width} x {height} pixels, at most {most_pixels} are decoded")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("it is an animation")
        image.load()
    except Exception as error:  # Pillow's readers raise nearly anything
        raise Refused(f"{name}: not a whole image ({_reason(error)})", GET_AGAIN) from error
    return image


def check_png(data: bytes, *, may_go_on: bool = False) -> None:
    """A ValueError where any byte of a PNG file is not as it was written: every chunk has a checksum, and nothing may follow the last unless it may go on."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("no PNG file")
    place, kind = 8, b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise ValueError("cut off")
        length, kind = struct.unpack_from(">I4s", data, place)
        if place + 12 + length > len(data):
            raise ValueError("cut off")
        if zlib.crc32(data[place + 4 : place + 8 + length]) != struct.unpack_from(">I", data, place + 8 + length)[0]:
            raise ValueError(f"checksum of the chunk at byte {place} does not hold")
        place += 12 + length
    if place != len(data) and not may_go_on:
        raise ValueError("bytes after its end")


def zip_members(path: Path, *, most_bytes: int) -> list[zipfile.ZipInfo]:
    """The members of a zip archive, for reading by index into memory: plain names, each once, together at most `most_bytes` when unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise Refused(f"{path}: not a readable zip archive ({_reason(error)})", GET_AGAIN) from error
    if len(members) > MOST_MEMBERS:
        raise Refused(f"{path}: {len(members)} members, at most {MOST_MEMBERS} are read", GET_AGAIN)
    seen: set[str] = set()
    for member in members:
        try:
            check_inside(member.filename)
        except ValueError as error:
            raise Refused(f"{path}: the member {error}", GET_AGAIN) from error
        if member.filename in seen:
            raise Refused(f"{path}: the member {shown(member.filename)} is there twice", GET_AGAIN)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise Refused(f"{path}: the member {shown(member.filename)} is a link", GET_AGAIN)
        seen.add(member.filename)
    if (total := sum(member.file_size for member in members)) > most_bytes:
        raise Refused(f"{path}: unpacks to {total} bytes, at most {most_bytes} are read", GET_AGAIN)
    return members


# safetensors ------------------------------------------------------------------------------------------------------------------------


def check_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of a safetensors file whose header, sizes and ranges hold together; nothing else of it is read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise Refused(f"{path} is truncated or no safetensors file (a header of {length} bytes in a file of {size})", GET_AGAIN)
            header = parse_json(file.read(length), f"{path}: its header")
    except OSError as error:
        raise storage.refusal(error, path) from error
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise Refused(f"{path} is truncated or no safetensors file (its header is no table of at most {MOST_TENSORS} tensors)", GET_AGAIN)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise Refused(f"{path}: its metadata is not made of texts", GET_AGAIN)
    found, ranges = {}, []
    for name, entry in header.items():
        kind, shape, begin, end = _tensor(entry, name, path)
        found[name] = (kind, shape)
        ranges.append((begin, end))
    place = 0
    for begin, end in sorted(ranges):
        if begin != place:
            raise Refused(f"{path}: tensors overlap or leave a gap at byte {place} of the data", GET_AGAIN)
        place = end
    if place != size - 8 - length:
        raise Refused(f"{path} is truncated or no safetensors file ({size - 8 - length} bytes of data, the header tells of {place})", GET_AGAIN)
    return found


def _tensor(entry: Any, name: str, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, begin, end)
        holds = len(name) <= LONGEST_NAME and len(shape) <= 16 and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
        holds = holds and end - begin == math.prod(shape) * ITEM_BYTES[kind]
    except (KeyError, TypeError, ValueError):
        holds = False
    if not holds:
        raise Refused(f"{path}: the header's entry for {shown(name)} does not hold together", GET_AGAIN)
    return kind, shape, begin, end


# ONNX -------------------------------------------------------------------------------------------------------------------------------

DOMAINS = ("", "ai.onnx", "com.microsoft")
NATIVE = ("EPContext",)  # nodes that make a runtime load compiled code from a file


@dataclass
class _Graph:
    """What is gathered while an ONNX file is walked."""

    external: list[dict[str, str]] = field(default_factory=list)
    nodes: list[tuple[str, str]] = field(default_factory=list)  # domain, operator
    own: set[str] = field(default_factory=set)  # domains of functions the file itself defines
    opsets: dict[str, int] = field(default_factory=dict)
    messages: int = 0


def check_onnx(path: Path, *, domains: Sequence[str] = DOMAINS) -> list[Path]:
    """The files with tensor data beside an ONNX file, all inside its folder; a graph that a runtime should not be given is refused.

    Call it before the file is handed to onnx, ONNX Runtime or TensorRT.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= LARGEST_ONNX:
            raise Refused(f"{path}: {size} bytes, expected an ONNX graph of at most {LARGEST_ONNX}", "Keep large tensors in external data.")
        with path.open("rb") as file:
            graph = _walk(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as error:
        raise storage.refusal(error, path) from error
    except _Malformed as error:
        raise Refused(f"{path}: not an ONNX file ({error})", GET_AGAIN) from error
    if not graph.opsets:
        raise Refused(f"{path}: not an ONNX file (it names no operator set)", GET_AGAIN)
    for domain, operator in graph.nodes:
        if domain not in domains and domain not in graph.own:
            raise Refused(f"{path}: the operator {shown(operator)} of {shown(domain)} is none of ours", "Export the model without custom operators.")
        if operator in NATIVE:
            raise Refused(f"{path}: the operator {operator} would load compiled code from a file", "Export the model anew on this machine.")
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
            raise Refused(f"{path}: external data {shown(location)} is reached through a link", "Keep the data in files beside the graph.")
    try:
        found = file.lstat()
    except OSError as error:
        raise Refused(f"{path}: external data {shown(location)} is not there ({error.strerror})", GET_AGAIN) from error
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise Refused(f"{path}: external data {shown(location)} is no file of its own", "Copy it, rather than linking it.")
    if offset < 0 or length < 0 or offset + length > found.st_size:
        raise Refused(f"{path}: external data {shown(location)} has {found.st_size} bytes, the graph asks for {offset} + {length}", GET_AGAIN)
    return file


class _Malformed(ValueError):
    pass


def _walk(data: memoryview) -> _Graph:
    graph = _Graph()
    # kind of message and nesting beside each, as graphs may lie in nodes in graphs
    waiting: list[tuple[Mapping[int, Callable[[_Graph, memoryview], None] | str], memoryview, int]] = [(_FORMS["model"], data, 0)]
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
    graph.opsets[_text(message, 1)] = next((value for key, value in _fields(message) if key == 2 and isinstance(value, int)), 0)


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
