"""Labels from attention: their numbers, the class prompt of an image, and which of its tokens stand for which class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datasetdm_fast.config import AttentionDefaults
from datasetdm_fast.data import Request
from datasetdm_fast.engine.labels.class_tables import ClassTable, known, spoken
from datasetdm_fast.engine.labels.words import mentioned
from datasetdm_fast.engine.loop.prompts import Tokenizer, count_tokens, shorten, token_limit
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import LEVELS

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

    def class_prompt(self, request: Request, asked: Sequence[str], own: ClassTable | None = None) -> str:
        """The text whose tokens the labels are read from: the words asked of an image, as its prompt names them one
        after the other, and with `parity` as the classes are listed.
        """
        if request.class_prompt or not asked:
            return request.class_prompt
        named = asked if self.parity else dict.fromkeys((*mentioned(request.prompt, asked, own), *asked))
        return self.start + self.between.join(spoken(tuple(named), own))

    def text(self, request: Request, words: str) -> str:
        """The prompt as it is encoded; with `parity` one that brings its class prompt is complete."""
        is_complete = not self.appends or (self.parity and request.class_prompt)
        return request.prompt if is_complete else appended(request.prompt, words)


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
    """The numbers asked for, or those of the model, whose latents have `side` cells."""
    found = AttentionRecipe(
        defaults.exponent if exponent < 0 else exponent,
        threshold or defaults.threshold,
        uncertainty or min(defaults.uncertainty, threshold or 1.0),
        self_cells or side // defaults.self_divisor,
        cross_cells or side // defaults.cross_divisor,
        defaults.appends or bool(parity),
        parity,
        "" if parity else defaults.start,
        " " if parity else defaults.between,
    )
    known = [side >> depth for depth in range(len(LEVELS))]
    for flag, cells in (("--self-cells", found.self_cells), ("--cross-cells", found.cross_cells)):
        if cells not in known:
            raise Refused(
                f"{flag} {cells}: this model has attention over {', '.join(map(str, known))} cells of a side",
                "Choose one of these; 0 takes what suits the model.",
            )
    if found.self_cells > 64:
        raise Refused(
            f"--self-cells {found.self_cells}: the averages of its attention would not fit into memory",
            "Choose 64 or fewer.",
        )
    if not found.uncertainty <= found.threshold <= 1:
        raise Refused(
            f"--uncertainty {found.uncertainty:g}: expected at most the threshold, "
            f"{found.threshold:g}, which is at most 1",
            "Give both, such as --threshold 0.6 --uncertainty 0.5.",
        )
    return found


def appended(prompt: str, words: str) -> str:
    """The prompt with the class words after it, unless it has them there."""
    return prompt if not words or prompt.rstrip().endswith(f"; {words}") else f"{prompt}; {words}"


def check_class_prompt(
    request: Request,
    asked: Sequence[str],
    recipe: AttentionRecipe,
    tokenizer: Tokenizer,
    own: ClassTable | None = None,
    *,
    tokenizer_cuts: bool = False,
) -> None:
    """Refuses what the text encoder does not take whole, unless its tokenizer is to cut it, and class words that the
    class prompt lacks or that have no place among its tokens.
    """
    words, limit = recipe.class_prompt(request, asked, own), token_limit(tokenizer)
    for text in () if tokenizer_cuts else (words, recipe.text(request, words)):
        if (count := count_tokens(text, tokenizer)) > limit:
            raise Refused(
                f"prompt {request.index}: with its class words {count} tokens, at most {limit} fit: {shorten(text)}",
                "Shorten it, or ask for fewer classes.",
            )
    found = columns(words, asked, tokenizer, by_words=bool(recipe.parity), own=own)
    if (most := max((places[-1] for _, places in found), default=0)) >= limit:
        raise Refused(
            f"prompt {request.index}: its class prompt has a class at word {most}, at most {limit - 1} words are read",
            "Name fewer classes.",
        )


def columns(
    words: str, asked: Sequence[str], tokenizer: Tokenizer, *, by_words: bool, own: ClassTable | None = None
) -> list[tuple[str, tuple[int, ...]]]:
    """The class words of a class prompt, each with its places among the tokens: those of all its tokens, once for each
    class; or `by_words`, as Dataset Diffusion has it, the place of the word, however many tokens stand before it, for
    each time that it is listed.
    """

    def parts(text: str) -> list:
        return text.lower().split() if by_words else tokenizer(text, truncation=False).input_ids[1:-1]

    def absent(found: Sequence[tuple[str, int, int]]) -> list[str]:
        return [name for name in asked if name not in {name for name, _, _ in found}]

    text, phrases = (
        parts(words),
        {name: [parts(form) for form in (said, name)] for name, said in zip(asked, spoken(asked, own))},
    )
    found = listed(text, phrases)
    if lacking := absent(found):
        found = listed(text, phrases | {name: [parts(form) for form in further_words(name, own)] for name in lacking})
    if lacking := absent(found):
        raise Refused(
            f"class prompt {shorten(words)}: does not hold the class word {shorten(spoken(lacking, own)[0])}",
            "Name every class of the prompt in it.",
        )
    if by_words:
        found = [(name, at, 1 if name in FIRST_WORD_ALONE else length) for name, at, length in found]
    else:
        found = [next(each for each in found if each[0] == name) for name in asked]
    return [(name, tuple(range(1 + at, 1 + at + length))) for name, at, length in found]  # after the start mark


def further_words(name: str, own: ClassTable | None) -> list[str]:
    """The words that mean a class, beside its name."""
    return [word.lstrip("~") for each in known((name,), own)[0] for word in each.words]


def listed(parts: Sequence, phrases: Mapping[str, Sequence[Sequence]]) -> list[tuple[str, int, int]]:
    """The names whose phrases are met from left to right, each with its place and length; the longest phrase wins."""
    ordered = sorted(
        ((list(one), name) for name, own in phrases.items() for one in own if one), key=lambda x: -len(x[0])
    )
    found, at = [], 0
    while at < len(parts):
        met = next(((one, name) for one, name in ordered if list(parts[at : at + len(one)]) == one), None)
        if met:
            found.append((met[1], at, len(met[0])))
        at += len(met[0]) if met else 1
    return found
