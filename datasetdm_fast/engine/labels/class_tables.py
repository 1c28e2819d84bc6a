"""Tables of class words: number, name, what a person says, official colour, and the words that mean a class; the
classes that a text names; the colours of classes, by which the same number looks alike in every label file and on every
page.
"""

import colorsys
import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
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

    classes: tuple[ClassWord, ...]
    other: tuple[str, ...] = ()

    def colour(self, name: str) -> tuple[int, int, int] | None:
        """The official colour of a class, None where the table has no such class."""
        word = _by_key(self).get(name_key(name))
        return word.colour if word else None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(word.name for word in self.classes)


def parse(text: str) -> ClassTable:
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
    return ClassTable(tuple(classes), tuple(other))


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
    return ClassTable(classes, tuple(text for word in words if not word.name for text in word.words))


def rows_of(table: ClassTable, names: Sequence[str], *, has_colours: bool = False) -> list[dict[str, Any]]:
    """Some classes of a table as JSON, and its phrases of no class under an empty name."""
    rows: list[dict[str, Any]] = []
    for word in _select(table, names):
        row: dict[str, Any] = {"name": word.name, "say": word.spoken, "words": list(word.words)}
        if has_colours and word.colour:
            row["colour"] = list(word.colour)
        rows.append(row)
    return [*rows, {"name": "", "say": "", "words": list(table.other)}]


def digest_of(table: ClassTable, names: Sequence[str]) -> str:
    """SHA-256 of what a table says of some classes."""
    return f"sha256:{hashlib.sha256(json.dumps(rows_of(table, names)).encode()).hexdigest()}"


def of_rows(rows: Any) -> ClassTable:
    """The table that `rows_of` has written; a ValueError where it is of another form."""
    documents.check_form(rows, [{"name": str, "say": str, "words": [str]}], "class_table")
    words = []
    for row in rows:
        documents.check_form(row.get("colour", []), [int], "class_table.colour")
        if len(colour := tuple(row.get("colour", ()))) not in (0, 3):
            raise ValueError(f"class_table: the colour of {documents.quote(row['name'])} is not three numbers")
        words.append(ClassWord(row["name"], row["say"], tuple(row["words"]), colour=colour or None))
    return of_words(tuple(words))


def of_categories(categories: object) -> ClassTable:
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
    return ClassTable(tuple(classes))


@cache
def builtin_table(name: str) -> ClassTable:
    """A table of TABLES, by name."""
    return parse((FOLDER / f"{name}.csv").read_text(encoding="utf-8"))


def _readable(name: str) -> str:
    """A class name as a person says it: `aerosol_can` is "aerosol can", `bow_(weapon)` is "bow"."""
    return " ".join(re.sub(r"\([^)]*\)", " ", name).replace("_", " ").split()) or name


@lru_cache(maxsize=1024)
def look_up(names: tuple[str, ...], custom: ClassTable | None) -> tuple[tuple[ClassWord, ...], tuple[str, ...]]:
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


PALETTE = bytes(value for number in range(256) for value in colour(number))  # of an index PNG of ours


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


# of words and of what ends in them, such as shelf
IRREGULAR: dict[str, str] = dict(
    pair.split()
    for pair in "calf calves, child children, elf elves, foot feet, goose geese, half halves, knife knives,"
    " leaf leaves, loaf loaves, man men, mouse mice, ox oxen, person people, potato potatoes, scarf scarves,"
    " thief thieves, tomato tomatoes, tooth teeth, wharf wharves, wife wives, wolf wolves, woman women".split(",")
)
# words that end as some of these, and have the usual plural all the same
REGULAR = frozenset("human ottoman talisman shaman caiman german roman mongoose".split())
# After these an adjective has its noun still to come; before any other word "orange" is a colour, before these a fruit.
AFTER_A_NOUN = frozenset(
    "a an the and or but with without of in on at by near beside behind under over above below between inside into"
    " onto from to for next is are was were sits sit lies lie stands stand hangs hang rests resting lying sitting"
    " standing hanging that which who while as against around across along among through".split()
)
NUMBERS = {word: k for k, word in enumerate("one two three four five six seven eight nine ten".split(), 1)}
# up to three words that describe the noun after them
ADJECTIVES = rf"\s+(?:(?!(?:{'|'.join(sorted(AFTER_A_NOUN))})\b)[\w-]+\s+){{0,3}}?$"
# "a", "an" or a number before them, or another word of the kind
COUNTED = re.compile(rf"\b(an?|\d{{1,3}}|{'|'.join(NUMBERS)}){ADJECTIVES}")
DESCRIBED = re.compile(
    rf"\b(a few|a (?:couple|group|pair) of|an?|the|some|several|many|\d{{1,3}}|{'|'.join(NUMBERS)}){ADJECTIVES}",
    re.IGNORECASE,
)
GROUPS = re.compile(r"(?:couple|family|families|crowd|pair)s?\b")  # words for several things
SIDE_WORD = re.compile(r"(?:(?<![A-Za-z])(?:left|right)|Left|Right|LEFT|RIGHT)(?![a-z])")
SIDE = re.compile(r"left|right|Left|Right|LEFT|RIGHT")  # also inside of a word: lefthip, eyeright, but bright as well
# l_eye, eye.R, rKnee, kneeL, but not LED and RED, nor a class that is a letter
SIDE_LETTER = re.compile(r"(?!^.$)(?:(?<![A-Za-z])[LlRr]|(?<=[a-z])[LR])(?=[A-Z][a-z]|[^A-Za-z]|$)")
# lank, RANKLE, FL, of names of which half are pairs
SIDE_OF_MANY = re.compile(r"(?<![A-Za-z])[LlRr](?=[A-Za-z])|(?<=[A-Za-z])[LlRr](?![A-Za-z])")
OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "l": "r", "L": "R"}
OTHER_SIDE |= {right: left for left, right in OTHER_SIDE.items()}
TOKEN = re.compile(r"[^\W_]+|[^\w\s'’-]")


# first token -> phrases that begin with it -> class index, if it means a class; whether it is an adjective too
Phrases = dict[str, dict[tuple[str, ...], tuple[tuple[int, ...], bool]]]


class ClassMatcher:
    """Finds classes by their names and the words that mean them; of overlapping phrases the longest counts."""

    def __init__(self, classes: Sequence[str], table: ClassTable | None = None):
        self.classes = tuple(classes)
        self.places = {name: place for place, name in enumerate(dict.fromkeys(classes))}
        words, other = look_up(self.classes, table)
        self._phrases = {first: phrases.copy() for first, phrases in _phrases_of(other).items()}
        for texts in zip(*([word.words, (word.spoken,), (word.name,)] for word in words), strict=True):
            for index in reversed(range(len(texts))):  # where two classes claim a word, the first has it
                for text in texts[index]:
                    _add(self._phrases, text, index)

    def spans(self, text: str) -> dict[str, list[tuple[int, int]]]:
        """Each class named, in the order of the text, with the begin and end of its phrases in it in lower case."""
        marks = find_marks(text)
        tokens, at = tuple(mark.group() for mark in marks), 0
        spans: dict[str, list[tuple[int, int]]] = {}
        while at < len(tokens):
            phrases = self._phrases.get(tokens[at], {})
            for length in sorted({len(phrase) for phrase in phrases}, reverse=True):
                phrase = marks[at : at + length]  # shorter at the end of the text
                match = phrases.get(tokens[at : at + length])
                after = tokens[at + length : at + length + 1]  # a noun, where the words before it describe that
                has_noun = after and after[0].isalnum() and after[0] not in AFTER_A_NOUN
                if match and not (match[1] and has_noun):
                    for index in match[0]:
                        mentions, begin = spans.setdefault(self.classes[index], []), phrase[0].start()
                        if mentions and mentions[-1][1] == marks[at - 1].end() == begin - 1:  # "a baby girl" is one
                            begin = mentions.pop()[0]
                        mentions.append((begin, phrase[-1].end()))
                    at += length - 1
                    break
            at += 1
        return spans


matcher = lru_cache(maxsize=64)(ClassMatcher)


def find_classes(prompt: str, classes: Sequence[str], table: ClassTable | None = None) -> tuple[str, ...]:
    """The classes a prompt names, in the order of `classes`: by name, plural, or a word that means the class."""
    phrases = matcher(tuple(classes), table)
    return tuple(sorted(phrases.spans(prompt), key=phrases.places.__getitem__))


def count_named(prompt: str, classes: Sequence[str], table: ClassTable | None = None) -> dict[str, int]:
    """How many things of each class a prompt names, without classes of which it does not say how many."""
    text, counts = _lower(prompt), {}
    named = matcher(tuple(classes), table).spans(prompt)
    for name, spans in named.items():
        singles = [span for span in spans if not GROUPS.match(text, *span)]
        words = [match[1] for span in singles if (match := _find_before(COUNTED, text, span, name, named, table))]
        if len(words) == len(spans):
            counts[name] = sum(map(_number, words))
    return counts


def _find_before(
    pattern: re.Pattern[str],
    text: str,
    noun: tuple[int, int],
    name: str,
    named: Mapping[str, Sequence[tuple[int, int]]],
    table: ClassTable | None,
) -> re.Match[str] | None:
    """What stands before a noun of a class in a text, after the other nouns that it names, but for those right before
    it ("a horse cart"); "a" belongs to no plural.
    """
    begin, stop = noun
    after = max((end for spans in named.values() for _, end in spans if end < begin - 1), default=0)
    match = pattern.search(text, after, begin)
    while match and match[1].lower() in ("a", "an", "one") and _single_of(_lower(text)[begin:stop], name, table):
        match = pattern.search(text, match.end(1), begin)
    return match


def _single_of(noun: str, name: str, table: ClassTable | None) -> str:
    """The word of a class of which this is the plural, empty where it is none's."""
    word = look_up((name,), table)[0][0]
    singles = (single.lstrip("~").lower() for single in (word.spoken, word.name, *word.words))
    return next((single for single in singles if f" {noun}".endswith(f" {plural(single)}")), "")


def _number(word: str) -> int:
    """The number that "a", "an", a numeral or digits stand for."""
    return 1 if word in ("a", "an") else NUMBERS.get(word) or int(word)


def classes_in_order(prompt: str, classes: Sequence[str], table: ClassTable | None) -> tuple[str, ...]:
    """The classes a prompt names, in the order of the prompt."""
    return tuple(matcher(tuple(classes), table).spans(prompt))


def always_named(
    classes: Sequence[str], seen: Sequence[tuple[Sequence[str], str]], table: ClassTable | None = None
) -> tuple[str, ...]:
    """Of `classes`, those named by the caption of every picture that shows them; `seen` pairs classes and captions."""
    unsaid = {name for shown, caption in seen for name in set(shown) - set(find_classes(caption, shown, table))}
    return tuple(name for name in classes if name not in unsaid)


def mirrored_names(names: Sequence[str]) -> list[int]:
    """For each joint or class the index of the one that takes its name in a mirror image."""
    return [*_mirrored_order(tuple(names))]


@lru_cache(maxsize=64)  # asked for every view
def _mirrored_order(names: tuple[str, ...]) -> tuple[int, ...]:
    order, of_many = _pair(names, _other_sides), _pair(names, partial(_exchange_one, SIDE_OF_MANY))
    merged = [other if other != k else of_many[k] for k, other in enumerate(order)]
    exchanged = [k for k, other in enumerate(merged) if other != k]
    if len(exchanged) < max(len(names) / 2, 4):  # lamp and ramp, LED and RED
        merged = order
    return tuple(other if merged[other] == k else k for k, other in enumerate(merged))


def _pair(names: Sequence[str], others: Callable[[str], Iterable[str]]) -> list[int]:
    """For each name the index of the first of its `others` that is among the names, else its own."""
    places = {name: k for k, name in reversed(list(enumerate(names)))}
    return [
        next((places[other] for other in others(name) if other in places and other != name), k)
        for k, name in enumerate(names)
    ]


def _other_sides(name: str) -> Iterator[str]:
    """What a name may be called on the other side, the likeliest first."""
    if SIDE_WORD.search(name):
        yield SIDE_WORD.sub(_other_side, name)
    for side in (SIDE, SIDE_LETTER):
        yield from _exchange_one(side, name)
        yield side.sub(_other_side, name)


def _exchange_one(side: re.Pattern[str], name: str) -> Iterator[str]:
    """The name with each of its sides exchanged alone."""
    for match in side.finditer(name):
        yield name[: match.start()] + _other_side(match) + name[match.end() :]


def _other_side(match: re.Match[str]) -> str:
    return OTHER_SIDE[match[0]]


def mirrored_text(text: str, classes: Sequence[str], table: ClassTable | None = None) -> str:
    """The text that names a class that has a side by the name it takes in a mirror image; the rest stays as it is."""
    sides = {name: classes[k] for name, k in zip(classes, mirrored_names(classes), strict=True) if classes[k] != name}
    if not sides or len(_lower(text)) != len(text):
        return text
    find = matcher(tuple(classes), table).spans
    named = find(text)
    spans = {span: sides[name] for name in named if name in sides for span in named[name]}
    for (begin, end), other in sorted(spans.items(), reverse=True):
        phrase = text[begin:end]
        called = (*_other_sides(phrase), *_exchange_one(SIDE_OF_MANY, phrase))
        usual = SIDE_WORD.sub(_other_side, phrase)
        text = text[:begin] + next((name for name in called if other in find(name)), usual) + text[end:]
    return text


def replaced_text(
    text: str, name: str, other: str, classes: Sequence[str], table: ClassTable | None = None, place: int | None = None
) -> str:
    """The text with `other` in place of a class it names ("an orange ball"), empty where it does not; of several
    things all, or the one at `place`, the first where there is none, beside what is left of those named with it.
    """
    text = unicodedata.normalize("NFC", text)
    named = matcher(tuple(classes), table).spans(text)
    things = [(span, 0) for span in named.get(name, [])]
    if place is not None:
        counted = [(span, _find_before(COUNTED, _lower(text), span, name, named, table)) for span, _ in things]
        things = [(span, k) for span, match in counted for k in range(_number(match[1]) or 1 if match else 1)]
        things = things[place : place + 1] or things[:1]
    parts, end = [], 0
    for span, k in things:
        described = _find_before(DESCRIBED, text, span, name, named, table)
        start = described.start() if described else span[0]
        left = "" if place is None else _without_one(text, start, span, name, table)
        parts += [text[end:start], " and ".join(filter(None, (left, other) if k else (other, left)))]
        end = span[1]
    return "".join(parts) + text[end:] if parts else ""


def _without_one(text: str, start: int, noun: tuple[int, int], name: str, table: ClassTable | None) -> str:
    """What a text says from `start` on of several things, without one of them: "one small dog" of "two small dogs",
    empty of one thing.
    """
    begin, stop = noun
    single = _single_of(_lower(text)[begin:stop], name, table)
    match = COUNTED.search(_lower(text), start, begin)
    count = _number(match[1]) - 1 if match else 0
    if match is None or count < 1:
        return text[start:stop] if single else ""  # "a few dogs"
    numeral = next((numeral for numeral, number in NUMBERS.items() if number == count), str(count))
    noun_left = text[begin:stop] if count > 1 else single or spoken([name], table)[0]
    return f"{numeral}{text[match.end(1) : begin]}{noun_left}"


def token_places(
    prompt: str, classes: Sequence[str], tokenizer: Any, limit: int, table: ClassTable | None = None
) -> dict[str, tuple[int, ...]]:
    """Of the classes that a prompt names, the places among its tokens of the words that name them; places from `limit`
    on, and those that the tokenizer cuts off, are left out.
    """
    rows = tokenizer.spans(unicodedata.normalize("NFC", prompt))
    # where a longer tokenizer's tokens follow, this one's last is an end mark
    limit = min(limit, tokenizer.model_max_length - hasattr(tokenizer, "longer"))
    places = {
        name: tuple(place for span in spans for place in places_within(rows, *span) if place < limit)
        for name, spans in matcher(tuple(classes), table).spans(prompt).items()
    }
    return {name: columns for name, columns in places.items() if columns}


def places_within(rows: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, ...]:
    """The places of the tokens that stand for any of these characters."""
    return tuple(place for place, (first, last) in enumerate(rows) if first < end and last > begin)


def find_marks(text: str) -> list[re.Match[str]]:
    """Matches of words and of marks that end a phrase in the text in lower case, without a possessive s."""
    return list(TOKEN.finditer(re.sub(r"['’]s\b", "  ", _lower(text))))


def _lower(text: str) -> str:
    """The text in lower case, with each accent in its letter: some systems write it as a character of its own. It is as
    long as in its own case, so a letter whose lower case is longer stays as it is.
    """
    text = unicodedata.normalize("NFC", text)
    lowered = unicodedata.normalize("NFC", text.lower())
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


def plural(noun: str) -> str:
    """The plural of a noun phrase: "glasses of wine", "police officers", "men"."""
    words = noun.split()
    head = _head(words)
    last = words[head]
    ending = next((ending for ending in IRREGULAR if last == ending or len(ending) > 2 and last.endswith(ending)), "")
    if ending and last.lower() not in REGULAR:
        last = last.removesuffix(ending) + IRREGULAR[ending]
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "es" if re.search(r"(s|x|z|ch|sh)$", last) else "s"
    return " ".join([*words[:head], last, *words[head + 1 :]])


def with_article(noun: str) -> str:
    """The noun phrase with the article it is said with: "an apple", "a unicorn"."""
    low = noun.lower()
    is_vowel = re.match(r"[aeiou]", low) and not re.match(r"(uni|use|uri|ute|uti|uku|ufo|eu|one)", low)
    return f"{'an' if is_vowel or re.match(r'(suv|hour|x-)', low) else 'a'} {noun}"


def photo_of(names: Sequence[str]) -> str:
    """Upstream's prompt, for every class there is instead of a random one."""
    return "a photo of " + ", ".join(f"a {name}" for name in names) if names else "a photo"


def _head(words: Sequence[str]) -> int:
    """The place of the noun that takes the plural."""
    return next((k - 1 for k, word in enumerate(words) if k and word in ("of", "in")), len(words) - 1)


@lru_cache(maxsize=64)
def _phrases_of(other: tuple[str, ...]) -> Phrases:
    """Phrases that mean no class."""
    phrases: Phrases = {}
    for text in other:
        _add(phrases, text)
    return phrases


def _add(phrases: Phrases, text: str, *index: int) -> None:
    tokens, forms = _forms(text.lstrip("~"))
    for form in forms:
        known = phrases.setdefault(form[0], {})
        is_adjective = form == tokens and (text.startswith("~") or known.get(form, ((), False))[1])
        known[form] = index, is_adjective


@lru_cache(maxsize=16384)  # for matchers of any of their classes
def _forms(text: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The words of a phrase; and these, their plural, and two words written as one: "wine glass", "wine glasses",
    "wineglass".
    """
    tokens = tuple(mark.group() for mark in find_marks(text))
    if not tokens:
        return (), []
    head = _head(tokens)
    noun = tokens[head]
    nouns = {noun, noun + "s", noun + "es", IRREGULAR.get(noun, noun)}
    for ending, plural in IRREGULAR.items():  # businesswoman, policeman, grandchild
        if len(ending) > 2 and noun.endswith(ending):
            nouns.add(noun.removesuffix(ending) + plural)
    if re.search(r"[^aeiou]y$", noun):
        nouns.add(noun[:-1] + "ies")
    forms = [(*tokens[:head], form, *tokens[head + 1 :]) for form in sorted(nouns)]
    return tokens, forms + [("".join(form),) for form in forms if len(form) == 2]
