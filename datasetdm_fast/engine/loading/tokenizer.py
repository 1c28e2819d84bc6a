"""Tokenizers, of which only the vocabulary is read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.loading.checks import (
    DAMAGED,
    LARGEST_VOCABULARY,
    SETTINGS,
    first_line,
    quiet_libraries,
    read_config,
)
from datasetdm_fast.errors import Missing, Refused

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BYTES = 256  # entries every byte-level vocabulary starts with
VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
VOCABULARY = "openai/clip-vit-large-patch14"  # the tokenizer of every SD 1.x and 2.x model


class OwnTokenizer:
    """The tokenizer of a folder that this package wrote, with the methods of a CLIPTokenizer that are used:
    transformers take a second to be imported, and this file is one of the library beneath them.
    """

    def __init__(self, folder: Path):
        settings = read_config(folder / "tokenizer_config.json")
        self.folder, self.model_max_length = folder, settings["model_max_length"]
        with _refusing(folder):
            self._rows = Tokenizer.from_str(storage.read(folder / "tokenizer.json", LARGEST_VOCABULARY).decode())
            self._pad: Any = self._rows.token_to_id(settings["pad_token"])

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
    ) -> SimpleNamespace:
        """The ids of a text or of each of some, begin and end among them, as transformers give them."""
        rows = [self._rows.encode(text).ids for text in ([texts] if isinstance(texts, str) else texts)]
        if truncation:
            rows = [row if len(row) <= max_length else [*row[: max_length - 1], row[-1]] for row in rows]
        if padding:
            rows = [row + [self._pad] * (max_length - len(row)) for row in rows]
        ids = rows[0] if isinstance(texts, str) else rows
        return SimpleNamespace(input_ids=torch.tensor(ids) if return_tensors else ids)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise Refused(
            f"model: {folder} holds no vocabulary, expected are vocab.json and merges.txt, or tokenizer.json",
            f"Put these files of the model there, or those of {VOCABULARY}.",
        )
    with _refusing(folder), quiet_libraries(), _only_vocabulary(folder) as safe:
        tokenizer = CLIPTokenizer.from_pretrained(safe, local_files_only=True)
    if len(tokenizer) < BYTES:
        raise Refused(
            f"model: {folder} gives a tokenizer of {len(tokenizer)} entries, fewer than the {BYTES} bytes every CLIP "
            "vocabulary starts with",
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
        raise Refused(f"model: {folder} cannot be read as a CLIP tokenizer ({first_line(error)})", DAMAGED) from error


@contextmanager
def _only_vocabulary(folder: Path) -> Iterator[Path]:
    """A folder with the words and marks of a tokenizer, and nothing else of `folder`."""
    settings = read_config(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    with tempfile.TemporaryDirectory() as made:
        safe = Path(made)
        readable = {key: value for key, value in settings.items() if key in SETTINGS["tokenizer"]}
        safe.joinpath("tokenizer_config.json").write_text(json.dumps(readable), encoding="utf-8")
        for name in VOCABULARY_FILES:
            if (folder / name).is_file():
                safe.joinpath(name).write_bytes(storage.read(folder / name, LARGEST_VOCABULARY))
        yield safe


def tokenizer_beside(path: Path, is_second: bool, allow_download: bool) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    folder = path.parent / "tokenizer"
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
        tokenizer.pad_token = "!"  # SD 2.x pads with id 0
    return tokenizer
