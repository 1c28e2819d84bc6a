"""Sentences for a class from the phrases of its category: the same seed, class and number give the same sentence."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.class_tables import ClassTable, ClassWord, find_classes, look_up, plural, with_article
from datasetdm_fast.engine.loop.prompts import refuse_file_names
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.untrusted import documents

FILE = Path(__file__).with_name("vocabulary.yaml")


@dataclass(frozen=True)
class Category:
    """Phrases that fit all things of one kind; none of them names a class of a known data set."""

    adjectives: tuple[str, ...]
    states: tuple[str, ...]
    places: tuple[str, ...]
    is_indoors: bool = False


@dataclass(frozen=True)
class Phrases:
    """All phrases, and the category of each class that has one by its name in a sentence."""

    categories: Mapping[str, Category]
    names: Mapping[str, str]  # class name in a sentence -> category
    outdoor_light: tuple[str, ...]
    indoor_light: tuple[str, ...]
    weather: tuple[str, ...]
    views: tuple[str, ...]
    viewpoints: tuple[str, ...]
    numbers: tuple[str, ...]
    without_article: tuple[str, ...]
    not_a_kind: tuple[str, ...]
    rooms: tuple[str, ...]
    streets: tuple[str, ...]

    def category_of(self, name: str) -> Category:
        """The category of a class, `thing` by default."""
        return self.categories[self.names.get(name, "thing")]


@cache
def read_vocabulary() -> Phrases:
    """The phrases of vocabulary.yaml."""
    import yaml

    document: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    categories, names = {}, {}
    for category, fields in document.pop("categories").items():
        names |= dict.fromkeys(_phrases(fields.pop("classes", "")), category)
        is_indoors = fields.pop("is_indoors", False)
        phrases = {field: _phrases(text) for field, text in fields.items()}
        categories[category] = Category(**phrases, is_indoors=is_indoors)
    return Phrases(categories, names, **{field: _phrases(text) for field, text in document.items()})


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split("|"))


SETS = ("voc", "coco", "cityscapes", "deepfashion", "pose", "nyu", "kitti", "demo")
MOST_TRIES = 200  # sentences sampled until one names the requested classes and no others
CLASS_NAME_SHARE = 0.5  # of nouns that are the name of the class, where it has other words


@dataclass(frozen=True)
class Sentence:
    """A prompt, the classes that it names, and the class or place that it was made for."""

    prompt: str
    classes: tuple[str, ...]
    group: str


class Grammar:
    """Sentences for the classes of one set; a sentence names the requested classes, and no other class of the set."""

    def __init__(self, classes: Sequence[str], seed: int = 0, table: ClassTable | None = None):
        self.classes, self.seed, self.table = tuple(classes), seed, table
        self.words = dict(zip(self.classes, look_up(self.classes, table)[0]))
        self.vocabulary = read_vocabulary()

    def sentence(self, name: str, number: int, others: Sequence[str] = ()) -> Sentence:
        """The number-th sentence of a class, with other classes in the same picture."""
        dice = random.Random(f"{self.seed}/{name}/{number}/{'/'.join(others)}")
        requested = {name, *others}
        for _ in range(MOST_TRIES):
            thing = self._noun_phrase(dice, self.words[name])
            if others:
                more = [self._noun_phrase(dice, self.words[other]) for other in others]
                relation = dice.choice(("next to", "beside", "and", "near", "in front of", "behind"))
                thing = f"{thing} {relation} {' and '.join(more)}"
            prompt = _compose(dice, thing, self.vocabulary.category_of(self.words[name].spoken))
            if set(classes := find_classes(prompt, self.classes, self.table)) == requested:
                return Sentence(prompt, classes, name)
        plain = " and ".join(with_article(self.words[word].spoken) for word in (name, *others))
        return Sentence(f"a photo of {plain}", tuple(word for word in self.classes if word in requested), name)

    def _noun_phrase(self, dice: random.Random, word: ClassWord) -> str:
        phrases = self.vocabulary
        kinds = [kind for kind in word.words if not kind.startswith("~") and kind not in phrases.not_a_kind]
        noun = word.spoken if not kinds or dice.random() < CLASS_NAME_SHARE else dice.choice(kinds)
        look = f"{dice.choice(phrases.category_of(word.spoken).adjectives)} " if dice.random() < 0.6 else ""
        if noun in phrases.without_article:
            return f"{look}{noun}"
        if dice.random() < 0.3:
            return f"{dice.choice(phrases.numbers)} {look}{plural(noun)}"
        return with_article(f"{look}{noun}")


class DemoGrammar:
    """Captions of the demo world that name a class: the words its model knows."""

    LIGHTS = ("", " at night", " at sunset", " in fog")

    def __init__(self, classes: Sequence[str] = (), seed: int = 0):
        self.classes, self.seed = tuple(classes) or world.THINGS, seed

    def sentence(self, name: str, number: int, others: Sequence[str] = ()) -> Sentence:
        dice, kinds = random.Random(f"{self.seed}/{name}/{number}/{'/'.join(others)}"), [name, *others]
        if not others and dice.random() < 0.4:
            kinds.append(dice.choice(world.THINGS))
        things = " and ".join(with_article(f"{dice.choice(tuple(world.COLOURS))} {kind}") for kind in kinds)
        prompt = f"{things} on {with_article(f'{dice.choice(tuple(world.TABLES))} table')}{dice.choice(self.LIGHTS)}"
        return Sentence(prompt, find_classes(prompt, self.classes), name)


class PlaceGrammar:
    """Sentences about places, for decoders of depth; they name no class."""

    def __init__(self, places: Sequence[str], category: Category, seed: int = 0):
        self.classes, self.category, self.seed = tuple(places), category, seed

    def sentence(self, name: str, number: int, others: Sequence[str] = ()) -> Sentence:
        dice = random.Random(f"{self.seed}/{name}/{number}")
        thing = with_article(f"{dice.choice(self.category.adjectives)} {name}")
        return Sentence(_compose(dice, thing, self.category), (), name)


SentenceGrammar = Grammar | DemoGrammar | PlaceGrammar


def _compose(dice: random.Random, thing: str, category: Category) -> str:
    """A sentence of a thing with its state, place, light and viewpoint, in one of several orders."""
    phrases = read_vocabulary()
    state, place = dice.choice(category.states), dice.choice(category.places)
    light = dice.choice(phrases.indoor_light if category.is_indoors else phrases.outdoor_light + phrases.weather)
    view, viewpoint = dice.choice(phrases.views), dice.choice(phrases.viewpoints)
    forms = (
        f"{view} {thing} {state} {place}, {light}",
        f"{view} {thing} {place}, {state}, {viewpoint}",
        f"{thing} {state} {place} {light}",
        f"{place}, {thing} {state}, {light}",
        f"{light}, {thing} {place}, {state}",
        f"{view} {thing}, {viewpoint}, {state} {place} {light}",
        f"{thing} {place}, {viewpoint}, {light}",
        f"{view} {thing} {light}, {state}",
    )
    return dice.choice(forms)


def open_grammar(
    name: str, classes: Sequence[str] = (), seed: int = 0, table: ClassTable | None = None
) -> SentenceGrammar:
    """The grammar of a set of classes, or of some of them; without a name, that of a table or of any words."""
    phrases = read_vocabulary()
    if name == "demo":
        return DemoGrammar(_select(classes, world.THINGS), seed)
    if name == "nyu":
        return PlaceGrammar(_select(classes, phrases.rooms), phrases.categories["room"], seed)
    if name == "kitti":
        return PlaceGrammar(_select(classes, phrases.streets), phrases.categories["scenery"], seed)
    if name == "pose":
        return Grammar(_select(classes, ("person",)), seed)
    if name:
        names = class_tables.builtin_table(name).names
        return Grammar(_select(classes, [word for word in names if word != "background"]), seed)
    return Grammar(_select(classes, table.names) if table else classes, seed, table)


def _select(requested: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The requested classes, all by default; refuses those that are not among the names."""
    for name in requested:
        if name not in names:
            raise Refused(
                f"--classes: {name!r} is not in this set{nearest(name, names)}", f"It has {', '.join(names)}."
            )
    return tuple(requested) or tuple(names)


def check_words(words: Sequence[str]) -> None:
    """Refuses names of files and text that is no Unicode among class words."""
    refuse_file_names(words)
    for word in words:
        if not documents.is_unicode(word):
            raise Refused(f"--classes: {word!r} is not valid Unicode", "Write the class words in UTF-8.")
