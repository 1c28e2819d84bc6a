"""JSON, YAML, XML and zip files of unknown origin: bounded in size and depth, and checked for their form."""

import json
import math
import re
import stat
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree
from xml.parsers import expat

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused

LARGEST_CONFIG = 2**20  # bytes of one config.json, run.json or the like
LARGEST_YAML = 64 * 2**10
LARGEST_XML = 2**20
MOST_MEMBERS = 20_000  # of one zip archive
DEEPEST = 32  # nested lists, objects, elements or graphs
LONGEST_NAME = 1024
_NOT_IN_A_PATH = re.compile(r"[\x00-\x1f\x7f\\:]")
GET_AGAIN = "Get the file again and compare its checksum."


def check_inside(name: str) -> str:
    """Returns a plain relative path that stays inside its folder; raises ValueError for any other name."""
    if not isinstance(name, str) or not name or len(name) > LONGEST_NAME or _NOT_IN_A_PATH.search(name):
        raise ValueError(f"{quote(name)} is no plain relative path")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or not set(parts) - {"", "."}:
        raise ValueError(f"{quote(name)} leads out of its folder")
    return name


def one_line(text: str) -> str:
    """Untrusted text for a message: one line of bounded length, without control characters."""
    line = " ".join(text.split())
    return "".join(
        letter if letter.isprintable() else ascii(letter)[1:-1]
        for letter in (line if len(line) <= 400 else line[:397] + "...")
    )


def quote(value: Any) -> str:
    """An untrusted value for a message: short, in quotes, without control characters."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; a file name in another encoding or half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def encodable(text: str) -> str:
    """A JSON text in which bytes that are not UTF-8, as Python holds them in file names, are escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def check_form(value: Any, form: Any, name: str = "") -> None:
    """Raises ValueError unless a JSON value has a form: a type, [form of items] or {key: form} of its required keys."""
    if isinstance(form, type):
        kinds = (int, float) if form is float else (form,)
        holds = (
            isinstance(value, kinds)
            and (form is bool or not isinstance(value, bool))
            and not (isinstance(value, float) and not math.isfinite(value))
        )
        expected = {
            str: "text",
            int: "a whole number",
            float: "a number",
            dict: "an object",
            list: "a list",
            bool: "true or false",
        }[form]
    else:
        holds, expected = isinstance(value, type(form)), "an object" if isinstance(form, dict) else "a list"
    if not holds:
        raise ValueError(f"{name or 'it'} is {quote(value)}, expected {expected}")
    if isinstance(form, list):
        for k, item in enumerate(value):
            check_form(item, form[0], f"{name}[{k}]")
    elif isinstance(form, dict):
        for key, inner in form.items():
            where = f"{name}.{key}" if name else key
            if key not in value:
                raise ValueError(f"{where} is missing")
            check_form(value[key], inner, where)


def parse_json(text: str | bytes, name: str, remedy: str = GET_AGAIN) -> Any:
    """The value of a JSON text that messages call `name`; repeated keys, NaN and deep nesting are refused."""
    if not text:
        raise Refused(f"{name}: empty, expected JSON", remedy)
    try:
        value = JSON_DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name}: not readable as JSON ({reason_of(error)})", remedy) from error
    depth, level = 0, [value]
    while level and depth <= DEEPEST:
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        depth += 1
    if depth > DEEPEST:
        raise Refused(f"{name}: nested more than {DEEPEST} deep", remedy)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quote(key)} occurs twice")
    return value


def _infinity(name: str) -> float:
    """An infinite number, which diffusers writes as a bound of a scheduler that has none; 1e999 is one, too."""
    if name == "NaN":
        raise ValueError(f"{name} is no JSON number")
    return float(name)


JSON_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_infinity)


def read_object(path: Path, *, most: int = LARGEST_CONFIG, remedy: str = GET_AGAIN) -> dict[str, Any]:
    """The object in a JSON file, such as a config.json."""
    return parse_object(storage.read(path, most), str(path), remedy)


def parse_object(text: str | bytes, name: str, remedy: str = GET_AGAIN) -> dict[str, Any]:
    value = parse_json(text, name, remedy)
    if not isinstance(value, dict):
        raise Refused(f"{name}: holds a JSON {type(value).__name__}, expected an object", remedy)
    return value


def read_yaml(path: Path, *, as_text: bool = False) -> Any:
    """The value of a YAML file of plain values; anchors, aliases and tags are refused.

    `as_text` leaves every scalar the text it is, where YAML 1.1 reads 1:30 as 90 and 010 as 8, and refuses repeated
    keys, of which the last one counts otherwise.
    """
    import yaml  # a run without --config does not need it

    base: Any = yaml.BaseLoader if as_text else yaml.SafeLoader

    class PlainLoader(base):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read", event.start_mark)
            if getattr(event, "tag", None):
                raise yaml.composer.ComposerError(None, None, "tags are not read", event.start_mark)
            self.depth += 1
            if self.depth > DEEPEST:
                raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} deep", event.start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys: set[str] = set()
            for key in (key for key, _ in node.value if as_text and isinstance(key, yaml.ScalarNode)):
                if key.value in keys:
                    problem = f"the key {quote(key.value)} occurs twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                keys.add(key.value)
            return super().construct_mapping(node, deep)

    data = storage.read(path, LARGEST_YAML)
    try:
        return yaml.load(data.decode("utf-8-sig"), Loader=PlainLoader)
    except Exception as error:  # a value such as 2001-99-99 makes PyYAML raise whatever the value's type raises
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise Refused(
            f"{path} is not valid YAML{place} ({reason_of(error)})", "Write one `name: value` per line, UTF-8."
        ) from error


def read_xml(path: Path, *, most: int = LARGEST_XML) -> ElementTree.Element:
    """The root element of an XML file; a document type, and with it every entity, is refused."""
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
    data = storage.read(path, most)
    try:
        parser.Parse(data, True)
        return builder.close()
    except (ValueError, LookupError, expat.ExpatError, AssertionError) as error:  # LookupError: an unknown encoding
        raise Refused(f"{path}: not readable as XML ({reason_of(error)})", GET_AGAIN) from error


def reason_of(error: BaseException) -> str:
    """What an error says, in one line; of a refusal its cause."""
    text = getattr(error, "problem", None) or " ".join(str(getattr(error, "cause", error)).split())
    return (text or type(error).__name__)[:160]


def zip_members(path: Path, *, most_bytes: int) -> list[zipfile.ZipInfo]:
    """The members of a zip archive by index: plain names, each once, at most `most_bytes` when unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise Refused(f"{path}: not a readable zip archive ({reason_of(error)})", GET_AGAIN) from error
    if len(members) > MOST_MEMBERS:
        raise Refused(f"{path}: {len(members)} members, at most {MOST_MEMBERS} are read", GET_AGAIN)
    names: set[str] = set()
    for member in members:
        try:
            check_inside(member.filename)
        except ValueError as error:
            raise Refused(f"{path}: the member {error}", GET_AGAIN) from error
        if member.filename in names:
            raise Refused(f"{path}: the member {quote(member.filename)} occurs twice", GET_AGAIN)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise Refused(f"{path}: the member {quote(member.filename)} is a link", GET_AGAIN)
        names.add(member.filename)
    if (total := sum(member.file_size for member in members)) > most_bytes:
        raise Refused(f"{path}: unpacks to {total} bytes, at most {most_bytes} are read", GET_AGAIN)
    return members
