"""Sentences for a class, drawn from the phrases of its category: the same seed, class and number, the same sentence."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from datasetdm_fast.engine.labels.class_tables import ClassTable, ClassWord, known
from datasetdm_fast.engine.labels.words import find_classes, plural, with_article
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.runs.prompting import vocabulary as v

TRIES = 200  # sentences drawn until one names the wanted classes and no others
OWN_NAME = 0.5  # share of nouns that are the name of the class, where it has other words


@dataclass(frozen=True)
class Sentence:
    """A prompt, the classes that it names, and the class or place it was made for."""

    prompt: str
    classes: tuple[str, ...]
    group: str


class Grammar:
    """Sentences for the classes of one set; a sentence names the classes asked for, and no other class of the set."""

    def __init__(self, classes: Sequence[str], seed: int = 0, own: ClassTable | None = None):
        self.classes, self.seed, self.own = tuple(classes), seed, own
        self.words = dict(zip(self.classes, known(self.classes, own)[0]))

    def sentence(self, name: str, number: int, beside: Sequence[str] = ()) -> Sentence:
        """The number-th sentence of a class, with further classes in the same picture."""
        draw = random.Random(f"{self.seed}/{name}/{number}/{'/'.join(beside)}")
        wanted = {name, *beside}
        for _ in range(TRIES):
            prompt = self._drawn(draw, self.words[name], [self.words[other] for other in beside])
            if set(found := find_classes(prompt, self.classes, self.own)) == wanted:
                return Sentence(prompt, found, name)
        plain = " and ".join(with_article(self.words[one].say) for one in (name, *beside))
        return Sentence(f"a photo of {plain}", tuple(one for one in self.classes if one in wanted), name)

    def _drawn(self, draw: random.Random, word: ClassWord, beside: Sequence[ClassWord]) -> str:
        category = v.CATEGORIES.get(word.say, v.THING)
        thing = self._noun_phrase(draw, word, category)
        if beside:
            others = [self._noun_phrase(draw, one, v.CATEGORIES.get(one.say, v.THING)) for one in beside]
            thing = (
                f"{thing} {draw.choice(('next to', 'beside', 'and', 'near', 'in front of', 'behind'))} "
                + " and ".join(others)
            )
        return _arranged(draw, thing, category)

    def _noun_phrase(self, draw: random.Random, word: ClassWord, category: v.Category) -> str:
        kinds = [kind for kind in word.words if not kind.startswith("~") and kind not in v.NO_KIND]
        noun = word.say if not kinds or draw.random() < OWN_NAME else draw.choice(kinds)
        look = f"{draw.choice(category.looks)} " if draw.random() < 0.6 else ""
        if noun in v.WITHOUT_ARTICLE:
            return f"{look}{noun}"
        if draw.random() < 0.3:
            return f"{draw.choice(v.NUMBERS)} {look}{plural(noun)}"
        return with_article(f"{look}{noun}")


class DemoGrammar:
    """Captions of the demo world that name a class: the words its model knows."""

    LIGHTS = ("", " at night", " at sunset", " in fog")

    def __init__(self, classes: Sequence[str] = (), seed: int = 0):
        self.classes, self.seed = tuple(classes) or world.THINGS, seed

    def sentence(self, name: str, number: int, beside: Sequence[str] = ()) -> Sentence:
        draw = random.Random(f"{self.seed}/{name}/{number}/{'/'.join(beside)}")
        kinds = [name, *beside]
        if not beside and draw.random() < 0.4:
            kinds.append(draw.choice(world.THINGS))
        things = " and ".join(with_article(f"{draw.choice(tuple(world.COLOURS))} {kind}") for kind in kinds)
        prompt = f"{things} on {with_article(f'{draw.choice(tuple(world.TABLES))} table')}{draw.choice(self.LIGHTS)}"
        return Sentence(prompt, find_classes(prompt, self.classes), name)


class PlaceGrammar:
    """Sentences about places, for decoders of depth: no class is meant."""

    def __init__(self, places: Sequence[str], category: v.Category, seed: int = 0):
        self.classes, self.category, self.seed = tuple(places), category, seed

    def sentence(self, name: str, number: int, beside: Sequence[str] = ()) -> Sentence:
        draw = random.Random(f"{self.seed}/{name}/{number}")
        thing = with_article(f"{draw.choice(self.category.looks)} {name}")
        return Sentence(_arranged(draw, thing, self.category), (), name)


def _arranged(draw: random.Random, thing: str, category: v.Category) -> str:
    """The thing with what it does, where, in which light and seen how, in one of several orders."""
    state, place = draw.choice(category.states), draw.choice(category.places)
    light = draw.choice(v.INDOOR_LIGHT if category.is_indoors else v.OUTDOOR_LIGHT + v.WEATHER)
    view, seen = draw.choice(v.VIEWS), draw.choice(v.VIEWPOINTS)
    forms = (
        lambda: f"{view} {thing} {state} {place}, {light}",
        lambda: f"{view} {thing} {place}, {state}, {seen}",
        lambda: f"{thing} {state} {place} {light}",
        lambda: f"{place}, {thing} {state}, {light}",
        lambda: f"{light}, {thing} {place}, {state}",
        lambda: f"{view} {thing}, {seen}, {state} {place} {light}",
        lambda: f"{thing} {place}, {seen}, {light}",
        lambda: f"{view} {thing} {light}, {state}",
    )
    return draw.choice(forms)()
