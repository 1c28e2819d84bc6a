"""Tokens and hidden states of prompts, as the pipelines of several families take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datasetdm_fast.kernels.transfer import to_device


def padded_tokens(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> Mapping[str, Tensor]:
    """`input_ids` and `attention_mask` [B, length] of the texts, cut off or padded."""
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return {name: to_device(value, device) for name, value in tokens.items()}


def clip_states(encoder: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The states [B, T, D] before CLIP's last layer, and its first output: what it projects [B, P], if it does."""
    device = next(encoder.parameters()).device
    tokens = padded_tokens(tokenizer, prompts, tokenizer.model_max_length, device)
    output = encoder(tokens["input_ids"], output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def t5_states(encoder: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """[B, length, D] last states, those of padding among them."""
    tokens = padded_tokens(tokenizer, prompts, length, next(encoder.parameters()).device)
    states: Tensor = encoder(tokens["input_ids"])[0]
    return states


def chat_states(
    encoder: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int, *, thinks: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """All hidden states [B, length, D] of a language model that reads each prompt as a message, and the mask [B,
    length] of the tokens that are no padding.
    """
    messages = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinks
        )
        for prompt in prompts
    ]
    tokens = padded_tokens(tokenizer, messages, length, next(encoder.parameters()).device)
    output = encoder(**tokens, output_hidden_states=True, use_cache=False)
    return output.hidden_states, tokens["attention_mask"].bool()


def join_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows [T, D] of several lengths as one tensor, padded with zeros, and the mask of what is none."""
    context = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=context.device)
    mask = torch.arange(context.shape[1], device=context.device) < lengths[:, None]
    return context, None if mask.all() else mask
