"""Tables of class words: number, name, what a person says, official colour, and the words that mean a class; and the
colours of classes, by which the same number looks alike in every label file and on every page.
"""

import colorsys
import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from datasetdm_fast.untrusted import documents

FOLDER = Path(__file__).parent / "class_tables"
TABLES = ("voc", "coco", "cityscapes", "deepfashion", "demo")
HUES = "3e4658 c9a27b e6523c 3484e4 f7b500 925cd6 ff78ac 2eb26c 00b6c6 b0ce3a f08a2c 5c68e6 d64080 1478a0 96aa82 b46e46"
COLOURS: tuple[Any, ...] = tuple(tuple(bytes.fromhex(hue)) for hue in HUES.split())
IGNORED = (236, 236, 236)
OURS, CUSTOM = "ours", "table"  # palettes: of this package, and that of the user's class table
NOTHING = (0, 0, 0)
BORDERS = {"voc": (224, 224, 192), "cityscapes": NOTHING, "coco": NOTHING}  # palette -> colour of ignored pixels
COLUMNS = ["number", "name", "say", "colour", "words"]


@dataclass(frozen=True)
class ClassWord:
    """One class: `spoken` is its name in a sentence, `words` are further words that mean it."""

    name: str
    spoken: str
    words: tuple[str, ...] = ()
    number: int | None = None
    colour: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)  # compared by identity: what is found in a table is cached for it
class ClassTable:
    """The classes of a data set, and the phrases that hold a class word without meaning the class ("hot dog")."""

    name: str
    classes: tuple[ClassWord, ...]
    other: tuple[str, ...] = ()

    def colour(self, name: str) -> tuple[int, int, int] | None:
        """The official colour of a class, None where the table has no such class."""
        word = _by_key(self).get(name_key(name))
        return word.colour if word else None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(word.name for word in self.classes)


def parse(text: str, name: str) -> ClassTable:
    """A table from CSV; a row without a name lists phrases that mean no class. A ValueError says what is wrong."""
    reader = csv.DictReader(io.StringIO(text))
    if not {"name"} <= set(reader.fieldnames or ()) <= set(COLUMNS):
        raise ValueError(f"the first line must name columns out of {', '.join(COLUMNS)}, among them name")
    classes: list[ClassWord] = []
    other: list[str] = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has another number of cells than the first line")
        words = tuple(filter(None, (word.strip() for word in row.get("words", "").split("|"))))
        if class_name := row["name"].strip():
            number, colour = row.get("number", "").strip(), row.get("colour", "").split()
            if number and not re.fullmatch(r"\d{1,5}", number):
                raise ValueError(f"line {reader.line_num}: the number of a class is {number!r}")
            if colour and not (len(colour) == 3 and all(re.fullmatch(r"\d{1,3}", c) and int(c) < 256 for c in colour)):
                raise ValueError(f"line {reader.line_num}: a colour is three numbers from 0 to 255, like 128 0 64")
            red_green_blue: Any = tuple(map(int, colour)) or None
            spoken_name = row.get("say", "").strip() or _readable(class_name)
            classes.append(ClassWord(class_name, spoken_name, words, int(number) if number else None, red_green_blue))
        else:
            other += words
    for column in ("name", "number"):
        values = [value for word in classes if (value := getattr(word, column)) is not None]
        if len(set(values)) < len(values):
            (twice, _), *_ = Counter(values).most_common(1)
            raise ValueError(f"the {column} {twice!r} occurs twice")
    return ClassTable(name, tuple(classes), tuple(other))


def _select(table: ClassTable, names: Sequence[str]) -> list[ClassWord]:
    keys = set(map(name_key, names))
    return [word for word in table.classes if name_key(word.name) in keys]


def words_of(table: ClassTable, names: Sequence[str]) -> tuple[ClassWord, ...]:
    """What a table says of some classes, and its phrases of no class under an empty name."""
    selected = (ClassWord(word.name, word.spoken, word.words) for word in _select(table, names))
    return *selected, ClassWord("", "", table.other)


@cache
def of_words(words: tuple[ClassWord, ...]) -> ClassTable:
    """The table that `words_of` was told of, the same one at every call."""
    classes = tuple(word for word in words if word.name)
    return ClassTable("class_words", classes, tuple(text for word in words if not word.name for text in word.words))


def rows_of(table: ClassTable, names: Sequence[str], *, has_colours: bool = False) -> list[dict[str, Any]]:
    """Some classes of a table as JSON, and its phrases of no class under an empty name."""
    selected = _select(table, names)
    rows: list[dict[str, Any]] = [
        {"name": word.name, "say": word.spoken, "words": list(word.words)} for word in selected
    ]
    if has_colours:
        rows = [row | ({"colour": list(word.colour)} if word.colour else {}) for row, word in zip(rows, selected)]
    return [*rows, {"name": "", "say": "", "words": list(table.other)}]


def digest_of(table: ClassTable, names: Sequence[str]) -> str:
    """SHA-256 of what a table says of some classes."""
    return f"sha256:{hashlib.sha256(json.dumps(rows_of(table, names)).encode()).hexdigest()}"


def of_rows(rows: Any, name: str) -> ClassTable:
    """The table that `rows_of` has written; a ValueError where it is of another form."""
    documents.check_form(rows, [{"name": str, "say": str, "words": [str]}], name)
    words = []
    for row in (row for row in rows if row["name"]):
        documents.check_form(row.get("colour", []), [int], f"{name}.colour")
        if len(colour := tuple(row.get("colour", ()))) not in (0, 3):
            raise ValueError(f"{name}: the colour of {documents.quote(row['name'])} is not three numbers")
        words.append(ClassWord(row["name"], row["say"], tuple(row["words"]), colour=colour or None))
    return ClassTable(name, tuple(words), tuple(word for row in rows if not row["name"] for word in row["words"]))


def of_categories(categories: object, name: str) -> ClassTable:
    """The table of an annotation file in COCO's or LVIS's form; a ValueError where it is of another form."""
    classes = []
    for category in categories if isinstance(categories, list) else ():
        if not (isinstance(category, dict) and isinstance(category.get("name"), str) and category["name"].strip()):
            raise ValueError("a category has no name")
        synonyms = category.get("synonyms", [])
        if not (isinstance(synonyms, list) and all(isinstance(word, str) for word in synonyms)):
            raise ValueError(f"the synonyms of {category['name']!r} are no list of words")
        class_name, number = category["name"].strip(), category.get("id")
        words = dict.fromkeys(word for word in map(_readable, synonyms) if word != _readable(class_name))
        classes.append(
            ClassWord(class_name, _readable(class_name), tuple(words), number if type(number) is int else None)
        )
    if not classes:
        raise ValueError("it has no categories")
    return ClassTable(name, tuple(classes))


@cache
def builtin_table(name: str) -> ClassTable:
    """A table of TABLES, by name."""
    return parse((FOLDER / f"{name}.csv").read_text(encoding="utf-8"), name)


def _readable(name: str) -> str:
    """A class name as a person says it: `aerosol_can` is "aerosol can", `bow_(weapon)` is "bow"."""
    return " ".join(re.sub(r"\([^)]*\)", " ", name).replace("_", " ").split()) or name


@cache
def look_up(names: tuple[str, ...], custom: ClassTable | None = None) -> tuple[tuple[ClassWord, ...], tuple[str, ...]]:
    """What is known of each name, from the user's table or the tables that hold most of the names, and the phrases
    of these tables that mean no class."""
    keys = [name_key(name) for name in names]
    tables = sorted(map(builtin_table, TABLES), key=lambda table: -sum(key in _by_key(table) for key in keys))
    if custom is not None:
        tables.insert(0, custom)
    words, used = [], []
    for name, key in zip(names, keys):
        source = next((table for table in tables if key in _by_key(table)), None)
        if source is None:
            words.append(ClassWord(name, _readable(name)))
        else:
            words.append(replace(_by_key(source)[key], name=name))
            used += [source] if source not in used else []
    return tuple(words), tuple(phrase for source in used for phrase in source.other)


@cache
def _by_key(table: ClassTable) -> dict[str, ClassWord]:
    return {name_key(word.name): word for word in table.classes}


def spoken(names: Sequence[str], table: ClassTable | None = None) -> list[str]:
    """Class names as a person says them, for prompts and text encoders: "dining table" for diningtable."""
    return [word.spoken for word in look_up(tuple(names), table)[0]]


def name_key(name: str) -> str:
    """A key shared by all spellings of a class name: they differ in capitals, underscores or how accents are stored."""
    return " ".join(unicodedata.normalize("NFC", name.lower()).replace("_", " ").split())


def colour(index: int) -> tuple[int, int, int]:
    """Red, green and blue, 0..255, of one class number; 255 is the ignored pixel."""
    if index == 255:
        return IGNORED
    if index < len(COLOURS):
        return COLOURS[index]
    # The golden ratio spreads any number of hues so that neighbours differ.
    turn = index * 0.618033988749895 % 1.0
    red, green, blue = colorsys.hsv_to_rgb(turn, 0.55 + 0.35 * (index % 3) / 2, 0.95 - 0.25 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


@cache
def palette(numbers: tuple[int, ...] = ()) -> bytes:
    """The 256 colours of an index PNG; value k has the colour of class numbers[k], of k itself beyond them."""
    shown = [*numbers, *range(len(numbers), 256)]
    return bytes(value for number in shown for value in colour(number))


@cache
def voc_palette() -> tuple[tuple[int, ...], ...]:
    """The 256 colours of PASCAL VOC: the bits of a number dealt out to red, green and blue."""
    bits = [[number >> place & 1 for place in range(9)] for number in range(256)]
    return tuple(tuple(sum(each[3 * k + part] << (7 - k) for k in range(3)) for part in range(3)) for each in bits)


def colour_in(palette: str, name: str, index: int) -> tuple[int, int, int]:
    """The colour of a class in a palette of `--palette`, by its name, and in ours by its number."""
    official = None if palette == OURS else builtin_table(palette).colour(name)
    return official or (NOTHING if palette != OURS and name == "background" else colour(index))


@cache
def official_palette(palette: str, classes: tuple[tuple[int, str], ...]) -> bytes:
    """The 256 colours of an index PNG in the palette of a data set; `classes` are its numbers with their names."""
    named = dict(classes)
    shown = [colour_in(palette, named[number], number) if number in named else colour(number) for number in range(255)]
    return bytes(value for each in (*shown, BORDERS[palette]) for value in each)
