"""The compiled guided step against the sampler it stands for, call by call; the GPU against the CPU."""

import numpy as np
import pytest
import torch

from datasetdm_fast import _C
from datasetdm_fast.engine.sampling import schedule as walk
from datasetdm_fast.engine.sampling.schedule import Update

pytestmark = pytest.mark.core

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SLOTS = 3
GUIDANCE = 7.5


def numbers(update: Update) -> np.ndarray:
    earlier = update.weights[1:]
    return np.array(
        [GUIDANCE, update.sample, *update.entry, update.weights[0], *earlier, *[0.0] * (SLOTS - len(earlier))],
        np.float32,
    )


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "dpm-solver++"])
def test_every_call_of_a_schedule(sampler):
    schedule = walk.make_schedule(SCHEDULER, sampler, 6)
    generator = torch.Generator().manual_seed(0)
    state = walk.ReferenceSampler(schedule, GUIDANCE, torch.randn((2, 4, 3, 5), generator=generator))
    for k, update in enumerate(schedule.updates):
        output = torch.randn((4, 4, 3, 5), generator=generator)
        latents = state.origin if update.restarts else state.latents
        history = torch.full((SLOTS, latents.numel()), float("nan"))  # slots of weight zero must not be read
        for slot, entry in enumerate(state.history):
            history[slot] = entry.flatten()
        answer = _C.guided_step(output.view(2, -1).numpy(), latents.flatten().numpy(), history.numpy(), numbers(update))
        state.step(k, output)
        np.testing.assert_allclose(answer[0], state.latents.flatten().numpy(), rtol=1e-5, atol=1e-5)
        if update.is_kept and state.history:
            np.testing.assert_allclose(answer[1], state.history[0].flatten().numpy(), rtol=1e-5, atol=1e-5)


def inputs() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    history = generator.normal(size=(SLOTS, 515)).astype(np.float32)
    history[2] = np.nan
    weights = np.array([GUIDANCE, 0.9, 0.1, 1.1, -0.5, 0.3, -0.2, 0.0], np.float32)
    return [
        generator.normal(size=(2, 515)).astype(np.float32),
        generator.normal(size=515).astype(np.float32),
        history,
        weights,
    ]


def test_sizes_that_do_not_fit_are_refused():
    output, latents, history, weights = inputs()
    for arguments, said in [
        ((output[[0, 1, 1]], latents, history, weights), "output is"),
        ((output, latents, history[:, :7].copy(), weights), "history has 7 values"),
        ((output, latents, history, weights[:7].copy()), "7 numbers, expected 8"),
        ((output, latents, history, weights[None]), "numbers \\[5"),
        ((output[0], latents, history, weights), "expected output"),
    ]:
        with pytest.raises(ValueError, match=said):
            _C.guided_step(*arguments)


def test_without_guidance_there_is_one_row():
    output, latents, history, weights = inputs()
    twice = _C.guided_step(output[[0, 0]], latents, history, weights)
    np.testing.assert_array_equal(_C.guided_step(output[:1].copy(), latents, history, weights), twice)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gpu_says_the_same(dtype, rows):
    output, latents, history, weights = (torch.from_numpy(one) for one in inputs())
    output = output[:rows].to(dtype)
    expected = _C.guided_step(*(one.numpy() for one in (output.float(), latents, history, weights)))
    device = [one.cuda() for one in (output, latents, history, weights)]
    following = torch.full((2, 515), float("nan"), device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    output, latents, history, weights = (one.data_ptr() for one in device)
    _C.guided_step_cuda(
        output,
        dtype.itemsize,
        dtype == torch.bfloat16,
        latents,
        history,
        SLOTS,
        weights,
        following.data_ptr(),
        515,
        stream,
        rows,
    )
    np.testing.assert_allclose(following.cpu().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(_C.cuda_device_count() > 0, reason="a CUDA device is there")
def test_without_a_device_it_says_what_is_missing():
    with pytest.raises(RuntimeError, match="guided_step_cuda: "):
        _C.guided_step_cuda(8, 4, False, 8, 8, 1, 8, 8, 1, 0)
