"""The phrases of the grammar, read from vocabulary.yaml: how things look, what they do, where they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
