"""Classifier-free guidance and one sampler update, read and written once."""

from __future__ import annotations

import torch
from torch import Tensor

from datasetdm_fast import _C
from datasetdm_fast.kernels.launch import block_sizes, blocks, ceil_divide, is_served, jit, tl

FIXED = 5  # coefficients before those of the earlier entries
DEVICES = {"cpu": "native", "untuned": "fused", "without triton": "native"}
BLOCKS = {"untuned": block_sizes("guided_step", 4, BLOCK=1024)}


def reference(output: Tensor, latents: Tensor, history: Tensor, numbers: Tensor) -> Tensor:
    """The next latents and this call's entry [2, B, C, h, w] from a network's `output`: [2B, C, h, w], without the text
    and with it, or [B, C, h, w] of a model without guidance.

    `history` [M, B, C, h, w] holds earlier entries, newest first; one of weight zero is not read. `numbers` [5 + M]
    fp32 are `coefficients`.
    """
    exact = torch.promote_types(latents.dtype, torch.float32)
    numbers = numbers.to(exact)
    guidance, sample, of_sample, of_output, weight = numbers[:FIXED]
    guided = output.to(exact)
    if len(output) != len(latents):
        without, with_text = guided.chunk(2)
        guided = without + guidance * (with_text - without)
    entry = of_sample * latents + of_output * guided
    weights = numbers[FIXED:].view(-1, *[1] * latents.ndim)
    earlier = torch.where(weights == 0, 0, weights * history).sum(0)
    return torch.stack([sample * latents + weight * entry + earlier, entry]).to(latents.dtype)


def _check(output: Tensor, latents: Tensor, history: Tensor, numbers: Tensor) -> None:
    is_served = len(output) in (len(latents), 2 * len(latents)) and output.shape[1:] == latents.shape[1:]
    if not is_served or history.shape[1:] != latents.shape or numbers.shape != (FIXED + len(history),):
        raise ValueError(
            f"guided_step: output {list(output.shape)}, history {list(history.shape)} and {len(numbers)} numbers "
            f"do not fit latents {list(latents.shape)}"
        )


def native(output: Tensor, latents: Tensor, history: Tensor, numbers: Tensor) -> Tensor:
    """`reference` from csrc/guided_step.cpp or guided_step.cu, fp32 latents and history wherever they lie."""
    _check(output, latents, history, numbers)
    if latents.dtype != torch.float32 or history.dtype != torch.float32 or (latents.is_cuda and not _C.built_with_cuda):
        return reference(output, latents, history, numbers)
    size, slots, rows = latents.numel(), len(history), len(output) // len(latents)
    numbers = numbers.float()
    if latents.is_cuda:
        following, is_bfloat = latents.new_empty((2, *latents.shape)), output.dtype == torch.bfloat16
        output, latents, history, numbers = (x.contiguous() for x in (output, latents, history, numbers))
        stream = torch.cuda.current_stream(latents.device).cuda_stream
        places = latents.data_ptr(), history.data_ptr() if slots else 0, slots, numbers.data_ptr(), following.data_ptr()
        _C.guided_step_cuda(output.data_ptr(), output.element_size(), is_bfloat, *places, size, stream, rows)
        return following
    arrays = output.float().reshape(rows, size), latents.reshape(size), history.reshape(slots, size), numbers
    return torch.from_numpy(_C.guided_step(*(x.contiguous().numpy() for x in arrays))).view(2, *latents.shape)


@jit
def _guided_step_kernel(
    output_ptr,  # [ROWS, size]
    latents_ptr,  # [size]
    history_ptr,  # [SLOTS, size]
    numbers_ptr,  # [5 + SLOTS] fp32
    out_ptr,  # [2, size]
    size,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    far = place + size  # in the second half of a pair
    without = tl.load(output_ptr + place, mask=inside, other=0.0).to(tl.float32)
    latents = tl.load(latents_ptr + place, mask=inside, other=0.0).to(tl.float32)
    guided = without
    if ROWS == 2:
        with_text = tl.load(output_ptr + far, mask=inside, other=0.0).to(tl.float32)
        guided = without + tl.load(numbers_ptr).to(tl.float32) * (with_text - without)
    entry = tl.load(numbers_ptr + 2).to(tl.float32) * latents + tl.load(numbers_ptr + 3).to(tl.float32) * guided
    answer = tl.load(numbers_ptr + 1).to(tl.float32) * latents + tl.load(numbers_ptr + 4).to(tl.float32) * entry
    earlier_place = place
    for slot in tl.static_range(SLOTS):
        weight = tl.load(numbers_ptr + 5 + slot).to(tl.float32)
        end = tl.where(weight == 0.0, 0, size)  # an entry of weight zero may never have been written
        earlier = tl.load(history_ptr + earlier_place, mask=place < end, other=0.0)
        answer += weight * earlier.to(tl.float32)
        earlier_place = earlier_place + size
    tl.store(out_ptr + place, answer.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + far, entry.to(out_ptr.dtype.element_ty), mask=inside)


def fused(output: Tensor, latents: Tensor, history: Tensor, numbers: Tensor) -> Tensor:
    """The result of `reference`; the numbers stay on the device, so one captured graph serves every call."""
    _check(output, latents, history, numbers)
    if not is_served("guided_step", output, latents, history, numbers):
        return reference(output, latents, history, numbers)
    out, sizes = latents.new_empty((2, *latents.shape)), blocks(BLOCKS, "guided_step", latents)
    parts = output.contiguous(), latents.contiguous(), history.contiguous(), numbers
    with torch.cuda.device_of(latents):  # Triton launches on the current device of the thread
        _guided_step_kernel[(ceil_divide(latents.numel(), sizes["BLOCK"]),)](
            *parts, out, latents.numel(), ROWS=len(output) // len(latents), SLOTS=len(history), **sizes
        )
    return out
