"""Samplers against diffusers' own schedulers and against 51 recorded calls of upstream's code."""

import copy
import inspect
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UNet2DConditionModel

from datasetdm_fast.config import PROFILES, SAMPLERS, SCHEDULERS, FlowRule
from datasetdm_fast.data import Capture, Text
from datasetdm_fast.engine.backbones.sd import SD, SD_SCHEDULER, levels
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loop.calls import FromOneGenerator
from datasetdm_fast.engine.sampling.schedule import (
    FOLLOWED,
    ImageNoise,
    ReferenceSampler,
    Sampler,
    SamplerState,
    Schedule,
    Update,
    add_noise,
    alphas_cumprod,
    checked_calls,
    choose_sampler,
    is_flow,
    make_schedule,
    open_sampler,
)
from datasetdm_fast.errors import Refused
from datasetdm_fast.stages import LEVELS

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
long_test = pytest.mark.skipif("DATASETDM_LONG_TESTS" not in os.environ, reason="the long form only")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "sampling.json").read_text())
PREDICTIONS = ("epsilon", "v_prediction")


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).double().norm() / truth.double().norm())


def compare(schedule, scheduler, calls: int, tolerance: float = 1e-5) -> None:
    """Step both with the same random outputs, each call from diffusers' sample, so that errors do not add up."""
    generator = torch.Generator().manual_seed(3)
    state = ReferenceSampler(schedule, 1.0, torch.randn(2, 4, 8, 8, generator=generator))
    theirs = state.latents
    assert schedule.timesteps == tuple(int(t) for t in scheduler.timesteps) and len(schedule) == calls
    for k, time in enumerate(scheduler.timesteps):
        output = torch.randn(theirs.shape, generator=generator)
        state.step(k, output)
        theirs = scheduler.step(output, time, theirs).prev_sample
        assert relative(state.latents, theirs) <= tolerance, f"call {k} at t={int(time)}"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [50, 4, 2, 30])  # 30 does not divide 1000
@pytest.mark.parametrize(("to_one", "offset"), [(False, 1), (True, 1), (True, 0)])
def test_pndm_of_today_is_diffusers_pndm(prediction, steps, to_one, offset):
    config = {
        **BETAS,
        "prediction_type": prediction,
        "steps_offset": offset,
        "set_alpha_to_one": to_one,
        "skip_prk_steps": True,
    }
    scheduler = PNDMScheduler(**config)
    scheduler.set_timesteps(steps)
    compare(make_schedule(config, "pndm", steps, "0.14.0"), scheduler, steps + 1)


@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler])
def test_numbers_of_training_are_those_of_the_scheduler(kind):
    """No model at hand differs from Stable Diffusion in them, so a constant in their place would go unnoticed."""
    config = {"num_train_timesteps": 600, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
    config |= {"steps_offset": 1, "set_alpha_to_one": False}
    scheduler = kind(**config, **({"skip_prk_steps": True} if kind is PNDMScheduler else {"clip_sample": False}))
    scheduler.set_timesteps(20)
    name, calls = ("pndm", 21) if kind is PNDMScheduler else ("ddim", 20)
    compare(make_schedule(config, name, 20, "0.14.0"), scheduler, calls)


def test_betas_of_a_config_are_taken_and_of_few_steps_one_is_left():
    assert alphas_cumprod({"trained_betas": [0.1, 0.2, 0.5]}).tolist() == pytest.approx([0.9, 0.72, 0.36])
    whole, last = (make_schedule({}, "ddim", 10, strength=strength) for strength in (1.0, 0.01))
    assert len(whole.timesteps) == 10 and last.timesteps == whole.timesteps[-1:]
    assert [len(make_schedule({}, "ddim", 10, strength=strength)) for strength in (0.54, 0.58)] == [5, 6]


def test_values_worked_out_by_hand_of_what_a_config_leaves_out_or_seldom_has():
    """LCM has 50 original steps, 20 apart, and begins at places 0, 12, 25 and 37 of them; of 40 training steps all 40.
    Euler may end at the least sigma: those of the betas are 4/3 and 1/3, and the last latents are not scaled to unit
    variance.
    """
    assert make_schedule({}, "lcm", 4).timesteps == (999, 759, 499, 259)
    assert make_schedule({"num_train_timesteps": 40}, "lcm", 4).timesteps == (39, 29, 19, 9)
    config = {"trained_betas": [0.1, 0.2, 0.5], "final_sigmas_type": "sigma_min"}
    first, last = make_schedule(config, "euler", 2).updates
    unit = (1 + 1 / 9) ** 0.5
    assert (first.sample, *first.weights) == pytest.approx((5 / 3 / unit, -1 / unit))
    assert (last.sample, *last.weights) == pytest.approx((unit, 0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_pndm_follows_timestep_spacing(prediction, spacing):
    config = {**BETAS, "prediction_type": prediction, "timestep_spacing": spacing, "skip_prk_steps": True}
    scheduler = PNDMScheduler(**config)
    scheduler.set_timesteps(20)
    compare(make_schedule(config, "pndm", 20, "0.14.0"), scheduler, 21)


def test_first_profile_is_the_recorded_one():
    schedule = make_schedule(SD_SCHEDULER, "pndm", 50)
    assert list(schedule.timesteps) == GOLDEN["timesteps"] and len(schedule) == 51


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "steps", [50, 7, 9]
)  # 7: the steps do not divide 1000; 9: the stride divides 999, one past the table
def test_first_profile_updates_like_an_offset_of_one_and_ends_with_nothing(prediction, steps):
    schedule = make_schedule({**SD_SCHEDULER, "prediction_type": prediction}, "pndm", steps, "0.3.0")
    scheduler = PNDMScheduler(**BETAS, prediction_type=prediction, skip_prk_steps=True)
    scheduler.set_timesteps(steps)
    # The alphas of 0.3.0 lie one later than its timesteps, and the last transfer stays at the second alpha.
    table = scheduler.alphas_cumprod
    scheduler.alphas_cumprod = torch.cat([table[1:], table[-1:]])
    scheduler.final_alpha_cumprod = table[1]
    generator = torch.Generator().manual_seed(5)
    state = ReferenceSampler(schedule, 1.0, torch.randn(1, 4, 8, 8, generator=generator))
    theirs = state.latents
    for k, time in enumerate(schedule.timesteps):
        output, before = torch.randn(theirs.shape, generator=generator), state.latents
        state.step(k, output)
        theirs = scheduler.step(output, time, theirs).prev_sample
        assert relative(state.latents, theirs) <= 1e-5, f"call {k}"
    assert torch.equal(state.latents, before)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("steps", "to_one", "spacing"),
    [(50, False, "leading"), (20, True, "leading"), (30, False, "linspace"), (1, True, "trailing")],
)
def test_ddim_is_diffusers_ddim(prediction, steps, to_one, spacing):
    """Comparable with clip_sample off, as every Stable Diffusion config has it, and eta 0."""
    config = {
        **BETAS,
        "prediction_type": prediction,
        "set_alpha_to_one": to_one,
        "timestep_spacing": spacing,
        "steps_offset": int(spacing == "leading"),
    }
    scheduler = DDIMScheduler(**config, clip_sample=False)
    scheduler.set_timesteps(steps)
    compare(make_schedule(config, "ddim", steps), scheduler, steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("is_karras", [False, True])
@pytest.mark.parametrize(
    ("steps", "spacing"),
    [(50, "linspace"), (20, "linspace"), (8, "linspace"), (1, "linspace"), (25, "leading"), (25, "trailing")],
)
def test_dpm_solver_is_diffusers_dpm_solver(prediction, steps, spacing, is_karras):
    """Comparable with algorithm dpmsolver++, order 2, midpoint and last sigma zero: diffusers' defaults, said aloud."""
    config = {
        **BETAS,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": int(spacing == "leading"),
        "use_karras_sigmas": is_karras,
    }
    comparable = {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
    }
    scheduler = DPMSolverMultistepScheduler(**config, **comparable)
    scheduler.set_timesteps(steps)
    compare(make_schedule(config, "dpm-solver++", steps), scheduler, steps)


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "dpm-solver++"])
def test_trailing_steps_are_as_many_as_were_asked_for(sampler):
    """numpy's arange of 1000 down by 1000 / 61 has 62 entries, the last one rounded to 0."""
    config = {**BETAS, "timestep_spacing": "trailing"}
    for steps in (61, 201, 499, 998):
        times = make_schedule(config, sampler, steps, "0.14.0").timesteps
        assert len(set(times)) == steps and times[0] == 999 and times[-1] >= 0


def test_spacing_defaults_to_that_of_diffusers():
    assert make_schedule(BETAS, "dpm-solver++", 20).timesteps[0] == 999
    assert make_schedule(BETAS, "ddim", 20).timesteps[0] == 950


def test_settings_left_out_are_those_of_diffusers():
    """A scheduler config may leave out spacing, offset and where the last step goes."""
    ddim, pndm = DDIMScheduler(**BETAS, clip_sample=False), PNDMScheduler(**BETAS, skip_prk_steps=True)
    for sampler, theirs, calls in (("ddim", ddim, 20), ("pndm", pndm, 21)):
        theirs.set_timesteps(20)
        compare(make_schedule(BETAS, sampler, 20, PROFILES[-1]), theirs, calls)


def test_warm_up_steps_that_diffusers_takes_where_a_config_does_not_say_are_refused():
    assert choose_sampler({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "auto") == "pndm"
    with pytest.raises(Refused, match="skip_prk_steps"):
        choose_sampler({"_class_name": "PNDMScheduler"}, "auto")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DPMSolverMultistepScheduler", ("use_lu_lambdas", "use_exponential_sigmas")),
        ("DPMSolverMultistepScheduler", ("use_beta_sigmas", "thresholding")),
        ("UniPCMultistepScheduler", ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "thresholding")),
        ("DDIMScheduler", ("clip_sample", "thresholding")),
        ("LCMScheduler", ("clip_sample", "thresholding")),
    ],
)
def test_other_noise_levels_and_clipped_samples_are_refused(kind, settings):
    for name in settings:
        assert name in inspect.signature(getattr(diffusers, kind)).parameters
        with pytest.raises(Refused, match=f"{name}=True"):
            choose_sampler({"_class_name": kind, "clip_sample": False, name: True}, "auto")


@pytest.mark.parametrize("kind", FOLLOWED)
def test_what_a_config_leaves_out_is_what_diffusers_takes(kind):
    theirs = inspect.signature(getattr(diffusers, kind)).parameters
    for name, (_, default) in FOLLOWED[kind].items():
        assert default == theirs[name].default
    given = {"_class_name": kind, "skip_prk_steps": True, "clip_sample": False}
    assert choose_sampler(given, "auto") == SCHEDULERS[kind]
    if theirs.get("clip_sample") and theirs["clip_sample"].default:
        with pytest.raises(Refused, match="clip_sample=True"):
            choose_sampler({"_class_name": kind}, "auto")


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_holds_the_entries_that_its_updates_read_and_no_more(name):
    of_flows = open_sampler(name).calls is None
    config, rule = ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, FlowRule()) if of_flows else (BETAS, None)
    levels = make_schedule(config, name, 10, PROFILES[-1], flow=rule)
    assert levels.memory == max(len(update.weights) for update in levels.updates) - 1


def test_the_range_of_steps_is_the_training_steps():
    assert make_schedule(BETAS, "ddim", 1000).timesteps == tuple(range(999, -1, -1))
    assert make_schedule(BETAS, "ddim", 1).timesteps == (0,)
    assert len(make_schedule(BETAS, "pndm", 2, PROFILES[-1])) == 3
    with pytest.raises(Refused, match="1000 steps do not fit into 1000 training steps"):
        make_schedule({**BETAS, "steps_offset": 1}, "ddim", 1000)
    leading = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading"}  # that of SDXL
    for name in ("euler", "euler-ancestral"):
        assert make_schedule(leading, name, 999).timesteps[0] == 999
        with pytest.raises(Refused, match="1000 steps do not fit into 1000 training steps"):
            make_schedule(leading, name, 1000)
    assert make_schedule({**BETAS, "steps_offset": 1}, "ddim", 500).timesteps[0] == 999


@pytest.mark.parametrize("seed", [2**31 - 1, 2**31, 2**32 - 2])
def test_noise_of_large_seeds_is_that_of_torch(seed):
    theirs = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ImageNoise([seed], (4, 8, 8)).draw()[0], theirs)
    assert not torch.equal(ImageNoise([seed + 1], (4, 8, 8)).draw()[0], theirs)


def test_noise_is_drawn_per_image_from_its_seed():
    alone = ImageNoise([7], (4, 16, 16)).draw()[0]
    assert alone.shape == (4, 16, 16) and alone.dtype == torch.float32
    assert torch.equal(alone, torch.randn((1, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(7))[0])


def test_guidance_moves_from_without_to_with_text():
    noise = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(4, 1, 1, 1)
    state = ReferenceSampler(Schedule(0, (0,), (Update(0.0, (1.0,)),), (0,)), 2.0, torch.zeros(2, 1, 1, 1))
    assert state.step(0, noise).flatten().tolist() == [5.0, 8.0]


def test_noised_latents_are_those_of_diffusers():
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = DDIMScheduler(**BETAS).add_noise(clean, noise, torch.tensor([100, 100]))
    assert relative(add_noise(BETAS, clean, noise, 100), theirs) < 1e-6
    for config in (BETAS, {}):
        assert torch.equal(alphas_cumprod(config), DDIMScheduler(**config).alphas_cumprod)


@pytest.mark.parametrize(
    ("change", "arguments", "word"),
    [
        ({}, ("eular", 50), "sampler"),
        ({}, ("pndm", 50, "0.9"), "profile"),
        ({}, ("pndm", 1), "steps"),  # it would start at t=0 and denoise nothing
        ({}, ("ddim", 0), "steps"),
        ({}, ("ddim", 1001), "steps"),
        ({}, ("dpm-solver++", 1000), "steps"),
        ({"prediction_type": "sample"}, ("pndm", 50), "prediction_type"),
        ({"beta_schedule": "sigmoid"}, ("pndm", 50), "beta_schedule"),
        ({"timestep_spacing": "odd"}, ("ddim", 50), "timestep_spacing"),
        ({"rescale_betas_zero_snr": True}, ("ddim", 50), "rescale_betas_zero_snr"),
    ],
)
def test_what_is_not_supported_is_refused(change, arguments, word):
    with pytest.raises(Refused, match=word):
        make_schedule({**BETAS, **change}, *arguments)


# The recording --------------------------------------------------------------------------------------------------------


def recorded_unet() -> UNet2DConditionModel:
    """The network of the recording; its weights are drawn key by key in sorted order from one generator."""
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(32, 64, 96, 96),
        cross_attention_dim=64,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    generator, weights = torch.Generator().manual_seed(GOLDEN["seed"]), {}
    for key, old in sorted(unet.state_dict().items()):
        drawn = torch.randn(old.shape, generator=generator)
        if drawn.dim() > 1:
            weights[key] = drawn / math.sqrt(drawn[0].numel())
        else:
            weights[key] = 1 + 0.02 * drawn if key.endswith("weight") and "norm" in key else 0.02 * drawn
    assert len(weights) == GOLDEN["keys"] and sum(weight.numel() for weight in weights.values()) == GOLDEN["params"]
    unet.load_state_dict(weights)
    return unet.eval()


class WideHeads:
    """Self-attention with heads of 4 channels padded to 16: zeros change nothing, and the CPU's kernel is 1.5 times
    faster, 100 s here.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        width = query.shape[-1]
        query, key, value = (torch.nn.functional.pad(part, (0, 16 - width)) for part in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)[..., :width]
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    unet = recorded_unet()
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(WideHeads())
    nothing = torch.nn.Identity()
    modules = {"unet": unet, "vae": nothing, "text_encoder": nothing}
    parts = {"modules": modules, "networks": {}, "tokenizers": {"tokenizer": None}}
    return TorchEngine(SimpleNamespace(**parts, backbone=SD, levels=levels(unet.config, 77, 512)))


def recorded_context(images: tuple[int, ...]) -> torch.Tensor:
    drawn = [
        torch.randn((2, 77, 64), generator=torch.Generator().manual_seed(1000 + GOLDEN["seed"] + image))
        for image in images
    ]
    return torch.stack(drawn, dim=1).flatten(0, 1)  # all unconditional rows, then all conditional ones


def call(engine: TorchEngine, k: int, state: ReferenceSampler, images: tuple[int, ...]) -> None:
    """Makes call k of recorded images made as one batch, whose latents, and features and maps where they are
    due, are as recorded.
    """
    schedule = state.schedule
    arguments, is_last = (state.latents, schedule.timesteps[k], Text(recorded_context(images))), k == len(schedule) - 1
    captures = is_last or k == 0  # the first call's capture is of the shapes alone
    output, capture = engine.denoise_and_capture(*arguments) if captures else (engine.denoise(*arguments), None)
    state.step(k, output)
    for row, image in enumerate(images):
        recorded = GOLDEN["images"][image]
        assert distance(state.latents[row], recorded["latents"][k]) <= 1e-4, f"image {image}, call {k}"
        if captures:
            check_capture(capture, row, recorded, worst=1e-4 if is_last else math.inf)
        if is_last:
            assert distance(state.latents[row], recorded["final"]) <= 1e-4


def check_capture(capture: Capture, row: int, recorded: dict, worst: float) -> None:
    for level, features in zip(LEVELS, capture.features, strict=True):
        for feature, known in zip(features, recorded["features"][level], strict=True):
            assert list(feature[row : row + 1].shape) == known["shape"]
            assert distance(feature[row], known) <= worst, level
    # The recording lists maps in the order of execution; a level reads its up layers, then its down layers.
    places, ordered = recorded["maps"], [recorded["maps"]["mid_cross"]]
    for side in (16, 32, 64):
        ordered.append(
            [
                known
                for place in ("up_cross", "down_cross")
                for known in places[place]
                if known["shape"][1] == side * side
            ]
        )
    assert [len(maps) for maps in ordered] == [1, 5, 5, 5]
    for maps, known_maps in zip(capture.maps, ordered, strict=True):
        for layer, known in zip(maps, known_maps, strict=True):
            assert list(layer[row].shape) == known["shape"]
            assert distance(layer[row], known) <= worst


def distance(value: torch.Tensor, recorded: dict) -> float:
    """Relative distance of the recorded entries of one image's tensor; its mean and spread must fit as well."""
    flat = value.double().flatten()
    truth = torch.tensor(recorded["values"], dtype=torch.double)
    scale = float(truth.norm() / math.sqrt(len(truth)))
    moments = max(abs(float(flat.mean()) - recorded["mean"]), abs(float(flat.std()) - recorded["std"])) / scale
    return max(relative(flat[recorded["at"]], truth), moments)


def first_state(images: tuple[int, ...]) -> ReferenceSampler:
    noise = ImageNoise([GOLDEN["seed"] + image for image in images], (4, 64, 64)).draw()
    return ReferenceSampler(make_schedule(SD_SCHEDULER, "pndm", 50), 7.0, noise)


def row_of(state: ReferenceSampler, row: int) -> ReferenceSampler:
    alone = copy.copy(state)
    alone.latents, alone.origin = (latents[row : row + 1] for latents in (state.latents, state.origin))
    alone.history = tuple(entry[row : row + 1] for entry in state.history)
    return alone


def test_the_first_two_calls_of_upstream_are_reproduced(engine):
    """The warm-up, for one image; the long form makes all, and diffusers' own PNDM is compared call by call above."""
    state = first_state((1,))
    for k in range(2):
        call(engine, k, state, (1,))


@long_test
def test_upstream_recording_is_reproduced_as_a_batch_of_two_and_alone(engine):
    """As a batch; alone, each form of the update and the captured call, from its state: a call takes seconds."""
    state = first_state((0, 1))
    for k in range(len(state.schedule)):
        if k < 5 or k == len(state.schedule) - 1:
            for image in (0, 1):
                call(engine, k, row_of(state, image), (image,))
        call(engine, k, state, (0, 1))


@long_test  # two minutes of CPU an image
@pytest.mark.parametrize("image", [0, 1])
def test_upstream_recording_is_reproduced_alone_from_its_noise(engine, image):
    state = first_state((image,))
    for k in range(len(state.schedule)):
        call(engine, k, state, (image,))


# The walk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "steps", "profile"),
    [("pndm", 9, "0.3.0"), ("pndm", 2, "0.14.0"), ("ddim", 4, "0.3.0"), ("dpm-solver++", 5, "0.3.0")],
)
def test_a_walk_is_guide_and_step(sampler, steps, profile, prediction):
    schedule = make_schedule({**BETAS, "prediction_type": prediction}, sampler, steps, profile)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 4, 5, 7, generator=generator)
    state, walk = ReferenceSampler(schedule, 7.5, noise), SamplerState(schedule, 7.5, noise.clone())
    for k in range(len(schedule)):
        output = torch.randn(6, 4, 5, 7, generator=generator)
        state.step(k, output)
        after = walk.step(k, output)
        assert after is walk.latents and torch.allclose(after, state.latents, rtol=1e-5, atol=1e-5), k


def test_a_sampler_is_one_file_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "halving_sampler.py").write_text(
        "from datasetdm_fast.engine.sampling.schedule import Sampler, Update\n"
        "def halving(scheduler, alphas, steps, prediction, profile):\n"
        "    return list(range(steps))[::-1], [Update(0.5, (0.0, 1.0)[: 1 + (k > 0)]) for k in range(steps)]\n"
        "SAMPLER = Sampler(halving, memory=1, least_steps=3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SAMPLERS, "halving", "halving_sampler:SAMPLER")
    schedule = make_schedule(BETAS, "halving", 3)
    assert schedule.timesteps == (2, 1, 0) and schedule.memory == 1
    state = SamplerState(schedule, 1.0, torch.full((1, 4, 2, 2), 8.0))
    for k in range(3):
        state.step(k, torch.full((2, 4, 2, 2), float(k)))
    assert state.latents.unique().tolist() == [2.0]  # ((8 / 2) / 2 + 0) / 2 + 1
    with pytest.raises(Refused, match="not within 3 .. 1000, the range of halving"):
        make_schedule(BETAS, "halving", 2)


@pytest.mark.parametrize(
    ("times", "updates", "wrong"),
    [
        ([2, 1], [Update(1.0, (1.0,))], "2 timesteps for 1 updates"),
        ([], [], "0 timesteps for 0 updates"),
        ([1000], [Update(1.0, (1.0,))], "the timestep 1000 is not within 0 .. 999"),
        ([2], [Update(1.0, (1.0, 0.5))], "the update of call 0 has 2 weights, expected 1 to 1"),
        ([2], [Update(math.nan, (1.0,))], "the update of call 0 has a coefficient that is not finite"),
    ],
)
def test_what_is_no_schedule_is_named(times, updates, wrong):
    sampler = Sampler(lambda *_: (times, updates), memory=1)
    with pytest.raises(ValueError, match=wrong):
        checked_calls(sampler, BETAS, torch.ones(1000), 2, "epsilon", "0.3.0")


def test_a_flow_whose_levels_depend_on_the_tokens_of_an_image_needs_their_number():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    assert len(make_schedule(config, "auto", 2, flow=FlowRule("uniform"), tokens=64)) == 2
    with pytest.raises(ValueError, match="tokens: the noise levels of this model depend on them"):
        make_schedule(config, "auto", 2, flow=FlowRule("uniform"))


def test_settings_that_are_null_are_left_out_and_an_offset_stays_within_the_training_steps():
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler"):
        config = dict.fromkeys(FOLLOWED[name]) | {"_class_name": name}
        assert choose_sampler(config, "auto") == SCHEDULERS[name]
    spaced = {"timestep_spacing": "leading", "steps_offset": 99}
    assert make_schedule(spaced, "ddim", 10).timesteps[0] == 999
    with pytest.raises(Refused, match="10 steps do not fit into 1000 training steps"):
        make_schedule(spaced | {"steps_offset": 100}, "ddim", 10)
    noise, shape = FromOneGenerator(), (1, 2, 2)
    for seed, place in ((3, 1), (4, 2), (3, 0), (3, 0)):  # of several runs, and of a batch that is filled up
        whole = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(noise.draw(seed, place, shape), whole[place])
    for config in ({"_class_name": "FlowMatchX"}, {"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}):
        assert is_flow(config) and not is_flow(dict.fromkeys(config, "epsilon") | {"use_flow_sigmas": False})
    assert make_schedule({"num_train_timesteps": 1000}, "pndm", 27, "0.3.0").timesteps[0] == 999  # a stride of 37
