"""Which classes a text names: one pass over its words."""

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from datasetdm_fast.engine.labels.class_tables import ClassTable, look_up

# of words and of what ends in them, such as shelf
IRREGULAR: dict[str, str] = dict(
    pair.split()
    for pair in "calf calves, child children, elf elves, foot feet, goose geese, half halves, knife knives,"
    " leaf leaves, loaf loaves, man men, mouse mice, ox oxen, person people, potato potatoes, scarf scarves,"
    " thief thieves, tomato tomatoes, tooth teeth, wharf wharves, wife wives, wolf wolves, woman women".split(",")
)
# After these an adjective has its noun still to come; before any other word "orange" is a colour, before these a fruit.
AFTER_A_NOUN = frozenset(
    "a an the and or but with without of in on at by near beside behind under over above below between inside into"
    " onto from to for next is are was were sits sit lies lie stands stand hangs hang rests resting lying sitting"
    " standing hanging that which who while as against around across along among through".split()
)
# an article, and up to three words that describe the noun after it
DESCRIBED = re.compile(
    rf"\b(?:an?|the)\s+(?:(?!(?:{'|'.join(sorted(AFTER_A_NOUN))})\b)[\w-]+\s+){{0,3}}?$", re.IGNORECASE
)
NUMBERS = {word: k for k, word in enumerate("one two three four five six seven eight nine ten".split(), 1)}
# "a", "an" or a number, and up to three words that describe the noun after it
COUNTED = re.compile(
    rf"\b(an?|\d{{1,3}}|{'|'.join(NUMBERS)})\s+(?:(?!(?:{'|'.join(sorted(AFTER_A_NOUN))})\b)[\w-]+\s+){{0,3}}?$"
)
SIDE_WORD = re.compile(r"(?:(?<![A-Za-z])(?:left|right)|Left|Right|LEFT|RIGHT)(?![a-z])")
SIDE = re.compile(r"left|right|Left|Right|LEFT|RIGHT")  # also inside of a word: lefthip, eyeright, but bright as well
OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
OTHER_SIDE |= {right: left for left, right in OTHER_SIDE.items()}
TOKEN = re.compile(r"[^\W_]+|[^\w\s'’-]")


class ClassMatcher:
    """Finds classes by their names and the words that mean them; of overlapping phrases the longest counts."""

    def __init__(self, classes: Sequence[str], table: ClassTable | None = None):
        self.classes = tuple(classes)
        words, other = look_up(self.classes, table)
        # first token -> phrases that begin with it -> class index, if it means a class; whether it is an adjective too
        self._phrases: dict[str, dict[tuple[str, ...], tuple[tuple[int, ...], bool]]] = {}
        for phrase in other:
            self._add(phrase)
        for texts in zip(*([word.words, (word.spoken,), (word.name,)] for word in words), strict=True):
            for index in reversed(range(len(texts))):  # where two classes claim a word, the first has it
                for text in texts[index]:
                    self._add(text, index)
        self._longest = {
            first: sorted({len(phrase) for phrase in phrases}, reverse=True) for first, phrases in self._phrases.items()
        }

    def _add(self, text: str, *index: int) -> None:
        tokens = tuple(mark.group() for mark in _marks(text.lstrip("~")))
        for form in _forms(tokens) if tokens else ():
            phrases = self._phrases.setdefault(form[0], {})
            is_adjective = form == tokens and (text.startswith("~") or phrases.get(form, ((), False))[1])
            phrases[form] = index, is_adjective

    def spans(self, text: str) -> dict[str, list[tuple[int, int]]]:
        """Each class named, in the order of the text, with the begin and end of its phrases in it in lower case."""
        marks = _marks(text)
        tokens, at = tuple(mark.group() for mark in marks), 0
        spans: dict[str, list[tuple[int, int]]] = {}
        while at < len(tokens):
            for length in self._longest.get(tokens[at], ()):
                phrase = marks[at : at + length]  # shorter at the end of the text
                match = self._phrases[tokens[at]].get(tokens[at : at + length])
                after = tokens[at + length : at + length + 1]  # a noun, where the words before it describe that
                has_noun = after and after[0].isalnum() and after[0] not in AFTER_A_NOUN
                if match and not (match[1] and has_noun):
                    for index in match[0]:
                        spans.setdefault(self.classes[index], []).append((phrase[0].start(), phrase[-1].end()))
                    at += length - 1
                    break
            at += 1
        return spans


@lru_cache(maxsize=64)
def matcher(classes: tuple[str, ...], table: ClassTable | None = None) -> ClassMatcher:
    return ClassMatcher(classes, table)


def find_classes(prompt: str, classes: Sequence[str], table: ClassTable | None = None) -> tuple[str, ...]:
    """The classes a prompt names, in the order of `classes`: by name, plural, or a word that means the class."""
    named = matcher(tuple(classes), table).spans(prompt)
    return tuple(name for name in dict.fromkeys(classes) if name in named)


def count_named(prompt: str, classes: Sequence[str], table: ClassTable | None = None) -> dict[str, int]:
    """How many things of each class a prompt names, without classes of which it does not say how many."""
    text, counts = _lower(prompt), {}
    for name, spans in matcher(tuple(classes), table).spans(prompt).items():
        matches = [COUNTED.search(text, 0, begin) for begin, _ in spans]
        words = [match[1] for match in matches if match]
        if len(words) == len(spans):
            counts[name] = sum(1 if word in ("a", "an") else NUMBERS.get(word) or int(word) for word in words)
    return counts


def classes_in_order(prompt: str, classes: Sequence[str], table: ClassTable | None = None) -> tuple[str, ...]:
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
    places = {name: k for k, name in reversed(list(enumerate(names)))}
    order = [
        next((places[other] for other in _other_sides(name) if other in places), k) for k, name in enumerate(names)
    ]
    return [other if order[other] == k else k for k, other in enumerate(order)]


def _other_sides(name: str) -> Iterator[str]:
    """What a name may be called on the other side, the likeliest first."""
    if SIDE_WORD.search(name):
        yield SIDE_WORD.sub(_other_side, name)
    for match in SIDE.finditer(name):
        yield name[: match.start()] + _other_side(match) + name[match.end() :]
    yield SIDE.sub(_other_side, name)


def _other_side(match: re.Match[str]) -> str:
    return OTHER_SIDE[match[0]]


def mirrored_text(text: str, classes: Sequence[str], table: ClassTable | None = None) -> str:
    """The text that names a class that has a side by the name it takes in a mirror image; the rest stays as it is."""
    order = mirrored_names(classes)
    sided = {name for name, other in zip(classes, order, strict=True) if classes[other] != name}
    if not sided or len(_lower(text)) != len(text):
        return text
    named = matcher(tuple(classes), table).spans(text)
    for begin, end in sorted({span for name in sided & named.keys() for span in named[name]}, reverse=True):
        side = SIDE_WORD if SIDE_WORD.search(text, begin, end) else SIDE
        text = text[:begin] + side.sub(_other_side, text[begin:end]) + text[end:]
    return text


def replaced_text(text: str, name: str, other: str, classes: Sequence[str], table: ClassTable | None = None) -> str:
    """The text with `other` in place of a class it names ("an orange ball"), empty where it does not."""
    lowered = _lower(text)
    text = unicodedata.normalize("NFC", text)
    text = text if len(text) == len(lowered) else lowered
    parts, end = [], 0
    for begin, stop in matcher(tuple(classes), table).spans(text).get(name, ()):
        described = DESCRIBED.search(text, end, begin)
        parts += [text[end : described.start() if described else begin], other]
        end = stop
    return "".join(parts) + text[end:] if parts else ""


def token_places(
    prompt: str, classes: Sequence[str], count: Callable[[str], int], limit: int, table: ClassTable | None = None
) -> dict[str, tuple[int, ...]]:
    """Of the classes that a prompt names, the places among its tokens of the words that name them; `count` tells the
    tokens of a text without marks, and places from `limit` on are left out.
    """
    text, places = _lower(prompt), {}
    for name, spans in matcher(tuple(classes), table).spans(prompt).items():
        ranges = ((count(text[:begin]), count(text[:end])) for begin, end in spans)
        # the start mark is the first token
        places[name] = tuple(k + 1 for begin, end in ranges for k in range(begin, end) if k + 1 < limit)
    return {name: columns for name, columns in places.items() if columns}


def _marks(text: str) -> list[re.Match[str]]:
    """Matches of words and of marks that end a phrase in the text in lower case, without a possessive s."""
    return list(TOKEN.finditer(re.sub(r"['’]s\b", "  ", _lower(text))))


def _lower(text: str) -> str:
    """The text in lower case, with each accent in its letter: some systems write it as a character of its own."""
    return unicodedata.normalize("NFC", text.lower())


def plural(noun: str) -> str:
    """The plural of a noun phrase: "glasses of wine", "police officers", "men"."""
    words = noun.split()
    head = _head(words)
    last = words[head]
    ending = next((ending for ending in IRREGULAR if last == ending or len(ending) > 2 and last.endswith(ending)), "")
    if ending and last != "human":
        last = last.removesuffix(ending) + IRREGULAR[ending]
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "es" if re.search(r"(s|x|z|ch|sh)$", last) else "s"
    return " ".join([*words[:head], last, *words[head + 1 :]])


def with_article(noun: str) -> str:
    """The noun phrase with the article it is said with: "an apple", "a unicorn"."""
    low = noun.lower()
    is_vowel = re.match(r"[aeiou]", low) and not re.match(r"(uni|use|eu|one)", low)
    return f"{'an' if is_vowel or re.match(r'(suv|hour|x-)', low) else 'a'} {noun}"


def photo_of(names: Sequence[str]) -> str:
    """Upstream's prompt, for every class there is instead of a random one."""
    return "a photo of " + ", ".join(f"a {name}" for name in names) if names else "a photo"


def _head(words: Sequence[str]) -> int:
    """The place of the noun that takes the plural."""
    return next((k - 1 for k, word in enumerate(words) if k and word in ("of", "in")), len(words) - 1)


def _forms(tokens: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The phrase, its plural, and two words written as one: "wine glass", "wine glasses", "wineglass"."""
    head = _head(tokens)
    noun = tokens[head]
    nouns = {noun, noun + "s", noun + "es", IRREGULAR.get(noun, noun)}
    for ending, plural in IRREGULAR.items():  # businesswoman, policeman, grandchild
        if len(ending) > 2 and noun.endswith(ending):
            nouns.add(noun.removesuffix(ending) + plural)
    if re.search(r"[^aeiou]y$", noun):
        nouns.add(noun[:-1] + "ies")
    forms = [(*tokens[:head], form, *tokens[head + 1 :]) for form in sorted(nouns)]
    return forms + [("".join(form),) for form in forms if len(form) == 2]
