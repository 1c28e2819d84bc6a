"""Tokenizers, of which only the vocabulary is read."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.backbones import DAMAGED
from datasetdm_fast.engine.backbones.fitting import (
    LARGEST_NUMBER,
    LARGEST_VOCABULARY,
    TOKENIZER_SETTINGS,
    first_line,
    quiet_libraries,
    read_config,
)
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.plugins import load_place
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BYTES = 256  # entries every byte-level vocabulary starts with
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))  # any of these files is one
VOCABULARY_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SENTENCEPIECE = "sentencepiece"
VOCABULARY = "openai/clip-vit-large-patch14"  # the tokenizer of every SD 1.x and 2.x model


class OwnTokenizer:
    """The tokenizer of a folder that this package wrote, with the methods of a CLIPTokenizer that are used:
    transformers take a second to be imported, and this file is one of the library beneath them.
    """

    def __init__(self, folder: Path, length: int = 0, chat_template: str = ""):
        settings = read_config(folder / "tokenizer_config.json")
        self.folder, self.model_max_length = folder, length or settings["model_max_length"]
        self._chat_template = chat_template
        with _refusing(folder):
            self._rows = Tokenizer.from_str(storage.read(folder / "tokenizer.json", LARGEST_VOCABULARY).decode())
            self._pad: Any = self._rows.token_to_id(settings["pad_token"])

    def load(self) -> Any:
        """As transformers have it."""
        tokenizer = load_tokenizer(self.folder)
        tokenizer.model_max_length = self.model_max_length
        if self._chat_template:
            tokenizer.chat_template = self._chat_template
        return tokenizer

    def __len__(self) -> int:
        return self._rows.get_vocab_size()

    def __call__(
        self,
        texts: str | list[str],
        *,
        padding: str = "",
        max_length: int = 0,
        truncation: bool = False,
        return_tensors: str = "",
        return_offsets_mapping: bool = False,
    ) -> SimpleNamespace:
        """The ids of a text or of each of some, begin and end among them, as transformers give them; or of one text the
        characters that each token stands for.
        """
        if return_offsets_mapping:
            return SimpleNamespace(offset_mapping=self._rows.encode(texts).offsets)
        rows = [self._rows.encode(text).ids for text in ([texts] if isinstance(texts, str) else texts)]
        if truncation:
            rows = [row if len(row) <= max_length else [*row[: max_length - 1], row[-1]] for row in rows]
        if padding:
            rows = [row + [self._pad] * (max_length - len(row)) for row in rows]
        ids = rows[0] if isinstance(texts, str) else rows
        return SimpleNamespace(input_ids=torch.tensor(ids) if return_tensors else ids)


def limit(tokenizer: Any, most: int, **more: Any) -> Any:
    """A copy with nothing shared, for a text encoder that reads so many tokens. It may have the `spans` of a prompt's
    tokens, and a `longer` tokenizer, of another text encoder, which reads what the first cuts off.
    """
    limited = copy.deepcopy(tokenizer)
    vars(limited).update(model_max_length=most, **more)
    return limited


def token_spans(
    tokenizer: Any, prompt: str, wrap: Callable[[Any, str], str] | None, dropped: int
) -> list[tuple[int, int]]:
    """Begin and end of the characters of a prompt that each encoded token stands for, equal where of none; the text
    encoder may `wrap` it into another text, and have its first tokens `dropped`.
    """
    text, before = prompt, 0
    if wrap:
        text, before = wrap(tokenizer, prompt), len(os.path.commonprefix([wrap(tokenizer, "0"), wrap(tokenizer, "1")]))
    places = tokenizer(text, return_offsets_mapping=True).offset_mapping
    inside = [[min(max(place - before, 0), len(prompt)) for place in pair] for pair in places]
    return [(begin, end) for begin, end in inside[dropped:]]


def load_tokenizer(folder: Path, classes: Sequence[str] = ("transformers:CLIPTokenizer",)) -> Any:
    """The tokenizer of a folder, as the first of these classes of transformers has it."""
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        raise Refused(
            f"model: {folder} holds no vocabulary, expected are vocab.json and merges.txt, or tokenizer.json",
            "Put these files of the model there.",
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")) and not find_spec(SENTENCEPIECE):
        raise Missing(
            f"model: {folder} holds spiece.model alone, which the library {SENTENCEPIECE} reads",
            f"Install it with: pip install {SENTENCEPIECE}, or put the model's tokenizer.json there.",
        )
    with _refusing(folder), quiet_libraries(), _only_vocabulary(folder) as safe:
        tokenizer = load_place(classes[0]).from_pretrained(safe, local_files_only=True)
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # refused by us
    most, is_clip = tokenizer.model_max_length, "CLIP" in classes[0]
    if not isinstance(most, (int, float)) or most < 1 or is_clip and most > LARGEST_NUMBER:
        raise Refused(
            f"model: {folder}: the tokenizer's model_max_length is {documents.quote(most)}, expected a number of "
            "tokens",
            DAMAGED,
        )
    if tokenizer.pad_token_id is None:
        raise Refused(f"model: {folder}: the tokenizer's pad_token is None, expected one of its tokens", DAMAGED)
    if len(tokenizer) < BYTES and (folder / "merges.txt").is_file():
        raise Refused(
            f"model: {folder} gives a tokenizer of {len(tokenizer)} entries, fewer than the {BYTES} bytes that "
            "vocabularies of its kind start with",
            DAMAGED,
        )
    return tokenizer


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Refuses, within the block, a vocabulary that the library cannot read."""
    try:
        yield
    except (Refused, Missing, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library panics with an error that is no Exception
        raise Refused(f"model: {folder} cannot be read as a tokenizer ({first_line(error)})", DAMAGED) from error


@contextmanager
def _only_vocabulary(folder: Path) -> Iterator[Path]:
    """A folder with the words and marks of a tokenizer, and nothing else of `folder`."""
    settings = read_config(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    with tempfile.TemporaryDirectory() as made:
        safe = Path(made)
        readable = {key: value for key, value in settings.items() if key in TOKENIZER_SETTINGS}
        safe.joinpath("tokenizer_config.json").write_text(json.dumps(readable), encoding="utf-8")
        for name in VOCABULARY_FILES:
            if (folder / name).is_file():
                safe.joinpath(name).write_bytes(storage.read(folder / name, LARGEST_VOCABULARY))
        yield safe


def tokenizer_beside(path: Path, is_second: bool, allow_download: bool, part: str = "tokenizer") -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    folder = path.parent / part
    if folder.is_dir():
        return load_tokenizer(folder)
    try:
        with quiet_libraries():
            tokenizer = CLIPTokenizer.from_pretrained(VOCABULARY, local_files_only=not allow_download)
    except (OSError, ValueError):
        tokenizer = ()
    if len(tokenizer) < BYTES:  # without files transformers hands back a tokenizer of two entries
        raise Missing(
            f"model: {path} holds no vocabulary, and neither {folder} nor the local hub cache has one",
            f"Put vocab.json and merges.txt of {VOCABULARY} into {folder}, or add --allow-download.",
        )
    if is_second:
        tokenizer.pad_token = "!"  # as Open CLIP does, with id 0
    return tokenizer
