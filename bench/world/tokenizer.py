"""The byte-pair tokenizer of a world's captions, built from its own words."""

import json
import math
from pathlib import Path

from transformers import CLIPTokenizer

from bench.world.worlds import WORLDS, World

TOKENS = 77
WORDS = (
    "a", "an", "the", "and", "on", "at", "in", "of", "with", "near",
    "next", "to", "beside", "night", "fog", "sunset", "day", "photo", "picture", "scene", ",", ".",
)  # fmt: skip


def words_of(world: World) -> tuple[str, ...]:
    """The words of a world's captions; those of the demo world come first, in one order, so that the tokens of another
    world begin with its tokens.
    """
    demo, own = WORLDS["demo"], (*world.classes, *world.colours, *world.tables, *world.words)
    return tuple(dict.fromkeys((*demo.classes, *demo.colours, *demo.tables, *WORDS, *own)))


def byte_letters() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """`symbols` after byte-pair merging by rank."""
    while len(symbols) > 1:
        pairs = [(ranks.get(pair, math.inf), at) for at, pair in enumerate(zip(symbols, symbols[1:]))]
        rank, at = min(pairs)
        if rank == math.inf:
            return symbols
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]
    return symbols


def build_tokenizer(folder: Path, world: World = WORLDS["demo"]) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which each word of the world is one token; other words fall back to pieces."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words_of(world):
        symbols = merge([*word[:-1], word[-1] + "</w>"], ranks)
        while len(symbols) > 1:
            ranks[symbols[0], symbols[1]] = len(ranks)
            symbols = merge([symbols[0] + symbols[1], *symbols[2:]], ranks)
    letters = byte_letters()
    entries = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in ranks),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer(
        vocab={entry: k for k, entry in enumerate(entries)}, merges=list(ranks), model_max_length=TOKENS
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({entry: k for k, entry in enumerate(entries)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ranks))
    broken = [word for word in words_of(world) if len(tokenizer(word)["input_ids"]) != 3]
    assert not broken, f"not one token each: {broken}"
    return tokenizer
