"""Labels from attention: their numbers, the class prompt of an image, and which of its tokens stand for which class."""

import unicodedata
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

from datasetdm_fast.config import AttentionDefaults
from datasetdm_fast.data import Request
from datasetdm_fast.engine.labels.class_tables import (
    ClassTable,
    classes_in_order,
    find_marks,
    look_up,
    matcher,
    places_within,
    spoken,
)
from datasetdm_fast.engine.loop.prompts import Tokenizer, shorten
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import LEVELS

TIMESTEPS = (100, 200, 300, 400)  # noise levels at which labels are read from the attention of a picture
FIRST_WORD_ALONE = ("hot dog", "teddy bear", "hair drier")  # of these Dataset Diffusion reads one word


@dataclass(frozen=True)
class AttentionRecipe:
    """How labels are read from attention."""

    exponent: int
    threshold: float
    uncertainty: float
    self_cells: int  # cells of a side of the self-attention
    cross_cells: int
    appends: bool = False  # whether the class words are added to the prompt
    parity: str = ""
    start: str = ""  # of a class prompt
    between: str = " "  # its words
    blocks: tuple[int, ...] = ()  # whose attention to the prompt is read, at the call nearest to `timestep`; none: all
    timestep: int = 0

    def class_prompt(self, request: Request, words: Sequence[str], table: ClassTable | None = None) -> str:
        """The text whose tokens the labels are read from: the query words of an image in the order in which its prompt
        names them, with `parity` in the order of the classes. Of some `blocks` it is the prompt itself.
        """
        if self.blocks:
            return request.prompt
        if request.class_prompt or not words:
            return request.class_prompt
        ordered = words if self.parity else dict.fromkeys((*classes_in_order(request.prompt, words, table), *words))
        return self.start + self.between.join(spoken(tuple(ordered), table))

    def text(self, request: Request, class_prompt: str) -> str:
        """The prompt as it is encoded, followed by its class prompt where the recipe `appends` that."""
        is_complete = not self.appends or (self.parity and request.class_prompt)
        if is_complete or not class_prompt or request.prompt.rstrip().endswith(f"; {class_prompt}"):
            return request.prompt
        return f"{request.prompt}; {class_prompt}"


def attention_recipe(
    defaults: AttentionDefaults,
    side: int,
    *,
    exponent: int = -1,
    threshold: float = 0.0,
    uncertainty: float = 0.0,
    self_cells: int = 0,
    cross_cells: int = 0,
    parity: str = "",
) -> AttentionRecipe:
    """The settings of a run or the model, of latents with `side` cells, or so many tokens where blocks are read."""
    recipe = AttentionRecipe(
        defaults.exponent if exponent < 0 else exponent,
        threshold or defaults.threshold,
        uncertainty or min(defaults.uncertainty, threshold or 1.0),
        self_cells or side // defaults.self_divisor,
        cross_cells or side // defaults.cross_divisor,
        defaults.appends or bool(parity),
        parity,
        "" if parity else defaults.start,
        " " if parity else defaults.between,
        defaults.blocks,
        defaults.timestep,
    )
    if recipe.blocks and (parity or recipe.exponent):
        flag = f"--parity {parity}" if parity else f"--exponent {recipe.exponent}"
        raise Refused(f"{flag}: of this model the attention to the prompt alone is read, at one call", "Drop it.")
    sides = [side >> depth for depth in range(1 if recipe.blocks else len(LEVELS))]
    for flag, cells in (("--self-cells", recipe.self_cells), ("--cross-cells", recipe.cross_cells)):
        if cells not in sides:
            raise Refused(
                f"{flag} {cells}: this model has attention over {', '.join(map(str, sides))} cells of a side",
                "Choose one of these; 0 takes what suits the model.",
            )
    if recipe.self_cells > 64 and not recipe.blocks:
        raise Refused(
            f"--self-cells {recipe.self_cells}: the averages of its attention would not fit into memory",
            "Choose 64 or fewer.",
        )
    if not recipe.uncertainty <= recipe.threshold <= 1:
        raise Refused(
            f"--uncertainty {recipe.uncertainty:g}: expected at most the threshold, "
            f"{recipe.threshold:g}, which is at most 1",
            "Give both, such as --threshold 0.6 --uncertainty 0.5.",
        )
    return recipe


def class_columns(
    class_prompt: str,
    words: Sequence[str],
    tokenizer: Tokenizer,
    *,
    by_words: bool,
    is_listed: bool = False,
    table: ClassTable | None = None,
) -> list[tuple[str, tuple[int, ...]]]:
    """The query words of a class prompt, each with its places among the tokens: those of its first mention, or of its
    name in a prompt that only lists them (`is_listed`); or `by_words`, as Dataset Diffusion has it, the place of the
    word, however many tokens stand before it, for each time that it is listed.
    """
    class_prompt = unicodedata.normalize("NFC", class_prompt)  # as matchers and tokenizers read it
    if by_words:
        matches = _find_listed(class_prompt.lower().split(), words, table, lambda text: text.lower().split())
        _check_named(class_prompt, words, [name for name, _, _ in matches], table)
        lengths = ((name, at, 1 if name in FIRST_WORD_ALONE else length) for name, at, length in matches)
        return [(name, tuple(range(1 + at, 1 + at + length))) for name, at, length in lengths]

    def split(text: str) -> list[str]:
        return [mark.group() for mark in find_marks(text)]

    marks, matches = find_marks(class_prompt), _find_listed(split(class_prompt), words, table, split)
    listed = {name: (marks[at].start(), marks[at + length - 1].end()) for name, at, length in reversed(matches)}
    mentions = {name: spans[0] for name, spans in matcher(tuple(words), table).spans(class_prompt).items()}
    places = mentions | listed if is_listed else listed | mentions
    _check_named(class_prompt, words, places, table)
    rows = tokenizer.spans(class_prompt)
    return [(name, places_within(rows, *places[name])) for name in words]


def _find_listed(
    parts: Sequence[str], words: Sequence[str], table: ClassTable | None, split: Callable[[str], list[str]]
) -> list[tuple[str, int, int]]:
    """See match_phrases; a class that is not there under its name may be under words that mean it."""
    phrases = {name: [split(text), split(name)] for name, text in zip(words, spoken(words, table))}
    matches = match_phrases(parts, phrases)
    if missing := [name for name in words if name not in {name for name, _, _ in matches}]:
        known = zip(missing, look_up(tuple(missing), table)[0])
        phrases |= {name: [split(text.lstrip("~")) for text in word.words] for name, word in known}
        matches = match_phrases(parts, phrases)
    return matches


def _check_named(class_prompt: str, words: Sequence[str], named: Container[str], table: ClassTable | None) -> None:
    if missing := [name for name in words if name not in named]:
        raise Refused(
            f"class prompt {shorten(class_prompt)}: does not hold the class word {shorten(spoken(missing, table)[0])}",
            "Name every class in it, or ask for fewer: --ask named.",
        )


def concept_places(word: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The places of a word's tokens where it is encoded by itself; refused where it has none."""
    start = len(tokenizer("", truncation=False).input_ids) - 1
    ids = tokenizer(word, truncation=False).input_ids[start:-1]
    places = places_within(tokenizer.spans(word), 0, len(word))
    if not places or getattr(tokenizer, "unk_token_id", None) in ids:
        raise Refused(f"--classes: no token says {shorten(word)}", "Use another name for the class.")
    return places


def match_phrases(parts: Sequence[str], phrases: Mapping[str, Sequence[list[str]]]) -> list[tuple[str, int, int]]:
    """The names whose phrases occur, from left to right, each with its place and length; the longest phrase wins."""
    ordered = sorted(
        ((phrase, name) for name, forms in phrases.items() for phrase in forms if phrase), key=lambda x: -len(x[0])
    )
    matches, at = [], 0
    while at < len(parts):
        match = next(((phrase, name) for phrase, name in ordered if parts[at : at + len(phrase)] == phrase), None)
        if match:
            matches.append((match[1], at, len(match[0])))
        at += len(match[0]) if match else 1
    return matches
