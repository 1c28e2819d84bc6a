"""Tokens and hidden states of prompts, as the pipelines of several families take them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.engine.backbones import LoadedModel
from datasetdm_fast.kernels.transfer import to_device


def tokenize(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> Mapping[str, Tensor]:
    """`input_ids` and `attention_mask` [B, length] of the texts, cut off or padded."""
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return {name: to_device(value, device) for name, value in tokens.items()}


def encode_clips(model: LoadedModel, prompts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each of two CLIPs the penultimate states [B, T, D], and its first output: the projection [B, P] of an encoder
    that has one.
    """
    for number in ("", "_2"):
        encoder, tokenizer = model.modules[f"text_encoder{number}"], model.tokenizers[f"tokenizer{number}"]
        tokens = tokenize(tokenizer, prompts, tokenizer.model_max_length, next(encoder.parameters()).device)
        output = encoder(tokens["input_ids"], output_hidden_states=True)
        yield output.hidden_states[-2], output[0]


def encode_t5(encoder: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Last states [B, length, D], also of padding, which is not masked."""
    tokens = tokenize(tokenizer, prompts, length, next(encoder.parameters()).device)
    return encoder(tokens["input_ids"])[0]


def encode_chat(model: LoadedModel, prompts: Sequence[str], length: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hidden states [B, length, D] of all layers of a language model that reads each prompt as a chat message, and the
    mask [B, length] of the tokens that are no padding.
    """
    encoder, tokenizer = model.modules["text_encoder"], model.tokenizers["tokenizer"]
    assert model.backbone.wrap is not None
    messages = [model.backbone.wrap(tokenizer, prompt) for prompt in prompts]
    tokens = tokenize(tokenizer, messages, length, next(encoder.parameters()).device)
    output = encoder(**tokens, output_hidden_states=True, use_cache=False)
    return output.hidden_states, tokens["attention_mask"].bool()


def join_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows [T, D] of several lengths as one tensor padded with zeros, and the mask of its tokens if any is padding."""
    context = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=context.device)
    mask = torch.arange(context.shape[1], device=context.device) < lengths[:, None]
    return context, None if mask.all() else mask
