"""The plan of a run: which image is made from which words, with which seed, in which batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from datasetdm_fast.data import Batch, Request
from datasetdm_fast.errors import Refused
from datasetdm_fast.generation.prompts import PromptSource, Tokenizer, count_tokens, fit, shown, token_limit
from datasetdm_fast.labels.class_tables import spoken
from datasetdm_fast.labels.words import find_classes
from datasetdm_fast.scenes.world import sample_scene

DEMO_SCENES = 900_000_000  # first scene seed of the demo captions, far from those the demo model was trained on
OPENINGS = ("a photo of", "a picture of", "a scene with")
SURROUNDINGS = ("", " at night", " at sunset", " in fog")


@dataclass(frozen=True)
class Plan:
    """Every image of a run, a pure function of the settings: sample k has prompt k in turn and seed run seed + k."""

    prompt: Callable[[int], str]
    words: tuple[str, ...]  # class words looked for in the prompts
    number: int
    seed: int
    batch_size: int
    digest: str  # of the prompts
    chosen: tuple[str, ...] = ()  # with per-class prompts: the classes, in turn

    def __len__(self) -> int:
        """Batches."""
        return -(-self.number // self.batch_size)

    def request(self, index: int) -> Request:
        prompt = self.prompt(index)
        named = find_classes(prompt, self.words)
        if self.chosen and (own := self.chosen[index % len(self.chosen)]) not in named:
            named = (*named, own)
        return Request(index, prompt, self.seed + index, named)

    def batch(self, index: int) -> Batch:
        """The requests index * batch_size and on, filled up to the batch size at the tail."""
        first = index * self.batch_size
        requests = tuple(self.request(k) for k in range(first, min(first + self.batch_size, self.number)))
        return Batch(index, requests, self.batch_size - len(requests))

    def __iter__(self) -> Iterator[Request]:
        return (self.request(index) for index in range(self.number))


def make_plan(
    source: PromptSource,
    tokenizer: Tokenizer,
    *,
    number: int,
    seed: int,
    batch_size: int,
    words: Sequence[str] = (),
    truncate: bool = False,
) -> Plan:
    """The plan of a run; `words` are the class words to look for where --classes names none."""
    words = source.classes or tuple(words)
    chosen = source.classes if source.per_class else ()
    if source.per_class:
        number = source.per_class * len(source.classes)
        longest = f"{max(OPENINGS, key=len)} an {{}}{max(SURROUNDINGS, key=len)}"
        for word in spoken(source.classes):
            if (count := count_tokens(longest.format(word), tokenizer)) > (most := token_limit(tokenizer)):
                raise Refused(
                    f"--classes: {shown(word)} makes a prompt of {count} tokens, at most {most} fit",
                    "Use a shorter name for the class.",
                )
    prompts = tuple(
        fit(prompt, tokenizer, f"{source.name} line {line}", words, truncate=truncate) for line, prompt in source.lines
    )

    names = spoken(chosen)

    def prompt(index: int) -> str:
        if chosen:
            return template(names[index % len(chosen)], index // len(chosen))
        return prompts[index % len(prompts)] if prompts else sample_scene(DEMO_SCENES + seed + index).caption

    # Batches of equal size leave less padding than full ones and a remainder.
    batches = -(-number // batch_size)
    return Plan(prompt, words, number, seed, -(-number // batches), source.digest, chosen)


def template(word: str, turn: int) -> str:
    """The prompt for the turn-th image of a class; all pairings of opening and surroundings come up equally often."""
    opening = OPENINGS[turn % len(OPENINGS)]
    surroundings = SURROUNDINGS[turn // len(OPENINGS) % len(SURROUNDINGS)]
    return f"{opening} {'an' if word[0].lower() in 'aeiou' else 'a'} {word}{surroundings}"
