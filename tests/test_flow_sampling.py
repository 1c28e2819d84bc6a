"""Samplers of flows, of Euler's kind and with fresh noise, against the schedulers and pipelines of diffusers."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from datasetdm_fast.config import FlowRule
from datasetdm_fast.engine.backbones.qwen_image import QWEN_IMAGE
from datasetdm_fast.engine.backbones.sd3 import SD3
from datasetdm_fast.engine.loop.inversion import ddim_latents
from datasetdm_fast.engine.sampling import schedule
from datasetdm_fast.engine.sampling.flow import unipc_levels
from datasetdm_fast.engine.sampling.schedule import ReferenceSampler, SamplerState, make_schedule
from datasetdm_fast.errors import Refused

EULER, BETAS = (
    "FlowMatchEulerDiscreteScheduler",
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
)
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "base_image_seq_len": 256}
# family -> scheduler config as published, rule, and what its pipeline hands to set_timesteps
FAMILIES = {
    "sd3": ({"shift": 3.0}, SD3.flow, None),
    "flux1-dev": ({**DYNAMIC, "max_image_seq_len": 4096, "max_shift": 1.15}, FlowRule("uniform"), "uniform"),
    "flux1-schnell": ({"shift": 1.0, "use_dynamic_shifting": False}, FlowRule("uniform"), "uniform"),
    "z-image": ({"shift": 3.0, "use_dynamic_shifting": False}, FlowRule("uniform-fp32"), "z-image"),
    "qwen-image": (
        {**DYNAMIC, "shift": 1.0, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02},
        QWEN_IMAGE.flow,
        "uniform",
    ),
    "flux2": ({**DYNAMIC, "max_image_seq_len": 4096, "max_shift": 1.15}, FlowRule("uniform", "empirical"), "uniform"),
}
SPACED: dict[str | None, Callable] = {
    "uniform": lambda steps: {"sigmas": np.linspace(1.0, 1 / steps, steps)},
    "z-image": lambda steps: {"sigmas": get_default_z_image_sigmas(steps)},
    None: lambda steps: {"num_inference_steps": steps},
}


def mu_of(family: str, config: dict, tokens: int, steps: int) -> float:
    if family == "flux2":
        return compute_empirical_mu(tokens, steps)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return calculate_shift(tokens, *(config[name] for name in names))


def stock(family: str, steps: int, tokens: int):
    config, _, spacing = FAMILIES[family]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    extra = {"mu": mu_of(family, config, tokens, steps)} if config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(**SPACED[spacing](steps), **extra)
    return scheduler


def ours(family: str, sampler: str, steps: int, tokens: int = 4096, **changes) -> schedule.Schedule:
    config, rule, _ = FAMILIES[family]
    return make_schedule({"_class_name": EULER, **config, **changes}, sampler, steps, flow=rule, tokens=tokens)


@pytest.mark.parametrize("tokens", [256, 4096, 4300, 4301])
@pytest.mark.parametrize("family", FAMILIES)
def test_levels_are_those_of_diffusers_to_the_last_bit(family, tokens):
    for steps in (*range(2, 12), 28, 50, 100):
        theirs, levels = stock(family, steps, tokens), ours(family, "euler", steps, tokens)
        assert list(levels.timesteps) == theirs.timesteps.tolist()
        steps_of = torch.tensor([update.weights[0] for update in levels.updates])
        assert torch.equal(steps_of, theirs.sigmas.diff()), steps


@pytest.mark.parametrize(
    "changes",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"shift": 1.15},
        {"num_train_timesteps": 600},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1},
    ],
)
def test_settings_of_the_scheduler_are_followed(changes):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | changes)
    scheduler.set_timesteps(
        9,
        **({"mu": mu_of("sd3", scheduler.config, 1000, 9)} if "use_dynamic_shifting" in changes else {}),
    )
    assert list(ours("sd3", "euler", 9, 1000, **changes).timesteps) == scheduler.timesteps.tolist()


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


def compare(levels: schedule.Schedule, scheduler, rows: int = 2, **call) -> None:
    """Whole walks with the same random outputs, and the same generators where there is fresh noise."""
    generator, seeds = torch.Generator().manual_seed(3), [11, 12, 13]
    noise = schedule.ImageNoise(seeds, (4, 6, 5))
    first = noise.draw()
    walk = SamplerState(levels, 4.0, first * levels.noise_scale, noise.draw)
    theirs, generators = first * getattr(scheduler, "init_noise_sigma", 1.0), [torch.Generator() for _ in seeds]
    for own, seed in zip(generators, seeds, strict=True):
        torch.randn((4, 6, 5), generator=own.manual_seed(seed))
    fresh = schedule.ImageNoise(seeds, (4, 6, 5))
    state = ReferenceSampler(levels, 4.0, fresh.draw() * levels.noise_scale, fresh.draw)
    stochastic = {"generator": generators} if levels.noisy_calls else {}
    assert len(levels) == len(scheduler.timesteps)
    for k, time in enumerate(scheduler.timesteps):
        assert levels.timesteps[k] == time.item()
        if hasattr(scheduler, "scale_model_input"):
            assert relative(walk.latents, scheduler.scale_model_input(theirs, time)) < 1e-5, k
        output = torch.randn((3 * rows, 4, 6, 5), generator=generator)
        guided = output if rows == 1 else output[:3] + 4.0 * (output[3:] - output[:3])
        theirs = scheduler.step(guided, time, theirs, **stochastic).prev_sample
        state.step(k, guided)
        latents = walk.step(k, output)
        assert relative(latents, state.latents) < 1e-5, k
    assert relative(latents, theirs) < 1e-5


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_euler_of_a_flow_is_diffusers(family, rows):
    compare(ours(family, "auto", 7, 1024), stock(family, 7, 1024), rows)


def test_stochastic_euler_draws_the_noise_of_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(4)
    compare(ours("sd3", "euler", 4, stochastic_sampling=True), scheduler)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_heun_of_a_flow_is_diffusers(steps):
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    compare(ours("sd3", "heun", steps), scheduler)


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 20])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("sampler", "kind"), [("dpm-solver++", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")]
)
def test_solvers_of_a_flow_are_diffusers(sampler, kind, family, steps):
    config = FAMILIES[family][0]
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    shift = {} if config.get("use_dynamic_shifting") else {"flow_shift": config["shift"]}
    if family == "qwen-image":
        if sampler != "unipc":
            with pytest.raises(Refused, match="shift_terminal"):
                ours(family, sampler, steps)
            return
        if steps == 1:
            with pytest.raises(Refused, match="needs 2 or more"):
                ours(family, sampler, steps)
            return
    scheduler = getattr(diffusers, kind).from_config({**config, **shift}, **flow)
    extra = {"mu": mu_of(family, config, 1024, steps)} if config.get("use_dynamic_shifting") else {}
    # the pipelines of FLUX leave solvers of flows their own levels, and that of Z-Image fails with them
    imposed = SPACED["uniform"](steps) if family == "qwen-image" else {"num_inference_steps": steps}
    scheduler.set_timesteps(**imposed, **extra)
    levels = ours(family, sampler, steps, 1024)
    assert [-update.entry[1] for update in levels.updates] == scheduler.sigmas[:-1].tolist()
    compare(levels, scheduler)
    again = {name: value for name, value in scheduler.config.items() if name != "shift"} | {"_class_name": kind}
    if not extra:  # else diffusers notes the shift in its own config
        assert make_schedule(again, "auto", steps, flow=FAMILIES[family][1]) == levels


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "changes"),
    [
        (30, {"timestep_spacing": "leading", "steps_offset": 1}),  # SDXL
        (4, {"timestep_spacing": "trailing"}),  # Lightning
        (1, {"timestep_spacing": "trailing"}),
        (20, {}),
        (11, {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}),
        (11, {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
        (11, {"use_karras_sigmas": True, "sigma_min": 0.001}),  # below that of the first training step
        (7, {"use_exponential_sigmas": True}),
        (6, {"final_sigmas_type": "sigma_min"}),
        (6, {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading", "steps_offset": 1}),
    ],
)
def test_euler_is_diffusers(prediction, steps, changes):
    config = {**BETAS, "prediction_type": prediction, **changes}
    scheduler = diffusers.EulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps)
    compare(make_schedule({"_class_name": "EulerDiscreteScheduler", **config}, "auto", steps), scheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ancestral_euler_is_diffusers(prediction, spacing):
    config = {**BETAS, "prediction_type": prediction, "timestep_spacing": spacing}
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**config)
    scheduler.set_timesteps(6)
    compare(make_schedule({"_class_name": "EulerAncestralDiscreteScheduler", **config}, "auto", 6), scheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_lcm_is_diffusers(prediction, steps):
    config = {**BETAS, "prediction_type": prediction, "_class_name": "LCMScheduler"}
    # so small a scaling that its boundary condition counts; steps of another distillation
    for changes in ({}, {"timestep_scaling": 0.002}, {"original_inference_steps": 20}):
        if steps > changes.get("original_inference_steps", 50):
            with pytest.raises(Refused, match="distilled for at most 20"):
                make_schedule(config | changes, "auto", steps)
            continue
        scheduler = diffusers.LCMScheduler(**BETAS, prediction_type=prediction, **changes)
        scheduler.set_timesteps(steps)
        compare(make_schedule(config | changes, "auto", steps), scheduler)
    with pytest.raises(Refused, match="distilled for at most 50"):
        make_schedule(config, "lcm", 51)


@pytest.mark.parametrize(
    ("sampler", "kind"), [("dpm-solver++", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")]
)
def test_training_steps_of_a_flow_are_those_of_its_scheduler(sampler, kind):
    config = {"_class_name": EULER, "shift": 3.0, "num_train_timesteps": 600}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    scheduler = getattr(diffusers, kind)(num_train_timesteps=600, **flow)
    scheduler.set_timesteps(9)
    levels = make_schedule(config, sampler, 9, flow=FlowRule(), tokens=256)
    assert list(levels.timesteps) == scheduler.timesteps.tolist()
    assert levels.noise_steps == pytest.approx([600 * float(sigma) for sigma in scheduler.sigmas[:9]], rel=1e-5)
    assert schedule.shares_at(config, 150) == (0.75, 0.25)
    with pytest.raises(Refused, match=r"601 is not within . \.\. 600"):
        make_schedule(config, sampler, 601, flow=FlowRule(), tokens=256)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm-solver++", "unipc"])
def test_the_last_steps_are_those_of_diffusers_from_there(sampler):
    """Image-to-image of diffusers begins at a later step of the same levels, at first order."""
    kind = {"euler": EULER, "heun": "FlowMatchHeunDiscreteScheduler", "dpm-solver++": "DPMSolverMultistepScheduler"}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    whole = getattr(diffusers, kind.get(sampler, "UniPCMultistepScheduler")).from_config({"shift": 3.0} | flow)
    whole.set_timesteps(10)
    levels = make_schedule({"_class_name": EULER, "shift": 3.0}, sampler, 10, strength=0.4, flow=FAMILIES["sd3"][1])
    first = 12 if sampler == "heun" else 6
    assert list(levels.timesteps) == whole.timesteps[first:].tolist()
    whole.set_begin_index(first)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((2, 4, 3, 3), generator=generator)
    walk = SamplerState(levels, 1.0, latents)
    for k, time in enumerate(whole.timesteps[first:]):
        output = torch.randn((2, 4, 3, 3), generator=generator)
        latents = whole.step(output, time, latents).prev_sample
        assert relative(walk.step(k, output), latents) < 1e-5, k


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm-solver++", "unipc"])
def test_a_walk_takes_away_exactly_the_noise_that_was_added(sampler):
    """With the true direction for the network's answer it ends at the image, wherever it begins."""
    image, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    config = {"_class_name": EULER, "shift": 3.0}
    for strength in (0.0, 0.3, 0.7, 1.0):
        levels = make_schedule(config, sampler, 10, strength=strength, flow=FlowRule())
        state = ReferenceSampler(levels, 1.0, schedule.add_noise(config, image, noise, levels.noise_steps[0]))
        for k in range(len(levels)):
            known = schedule.add_noise(config, image, noise, levels.noise_steps[k])
            assert sampler == "heun" or (state.latents - known).abs().max() < 1e-6, k
            state.step(k, noise - image)
        assert (state.latents - image).abs().max() < 1e-6, strength


@pytest.mark.parametrize(
    ("timestep", "steps", "places"), [(100, 4, [0, 25, 50, 75]), (3, 3, [0, 1, 2]), (1, 1, [0]), (0, 5, [0])]
)
def test_the_way_back_has_even_steps_and_one_call_at_least(timestep, steps, places):
    clean, times = torch.ones(1, 4, 8, 8), []
    denoise = lambda latents, time, text: times.append(time) or torch.zeros(1, 4, 8, 8)  # noqa: E731
    engine = SimpleNamespace(model=SimpleNamespace(scheduler={"_class_name": EULER}), denoise=denoise)
    found = ddim_latents(engine, clean, None, timestep, steps)
    assert times == places and torch.allclose(found, clean)


def test_a_flow_runs_back_from_its_image_to_noise():
    clean, direction = torch.randn((2, 2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    engine = SimpleNamespace(
        model=SimpleNamespace(scheduler={"_class_name": EULER}), denoise=lambda *_: torch.cat([clean, direction])
    )
    assert relative(ddim_latents(engine, clean, None, 700, 9), clean + 0.7 * direction) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_image_runs_to_its_noise_where_the_network_knows_both(prediction):
    clean, noise = torch.randn((2, 2, 4, 8, 8), generator=torch.Generator().manual_seed(1)).double()
    config = {"trained_betas": [0.1, 0.2, 0.5], "prediction_type": prediction}  # alphas of 0.9, 0.72 and 0.36
    shares, times = {0: (1.0, 0.0), 1: (0.72**0.5, 0.28**0.5), 2: (0.6, 0.8)}, []

    def denoise(latents, time, text):
        times.append(time)
        signal, noisy = shares[time]
        known = noise if prediction == "epsilon" else signal * noise - noisy * clean
        return torch.cat([clean, known])

    engine = SimpleNamespace(model=SimpleNamespace(scheduler=config), denoise=denoise)
    assert relative(ddim_latents(engine, clean, None, 2, 2), 0.6 * clean + 0.8 * noise) < 1e-6 and times == [0, 1]


def test_an_output_of_too_few_rows_is_no_guided_one():
    walk = SamplerState(make_schedule(BETAS, "euler", 3), 4.0, torch.zeros(1, 4, 2, 2), rows=2)
    with pytest.raises(ValueError, match="the output of call 0 has 1 rows, expected 2"):
        walk.step(0, torch.zeros(1, 4, 2, 2))


def test_noise_of_a_call_is_what_the_seed_of_an_image_draws_next():
    levels = make_schedule({**BETAS, "_class_name": "LCMScheduler"}, "auto", 3)
    assert levels.noisy_calls == 2
    noise = schedule.ImageNoise((5, 9), (4, 3, 5))
    own = torch.Generator().manual_seed(9)
    expected = [torch.randn((1, 4, 3, 5), generator=own)[0] for _ in range(3)]
    assert all(torch.equal(noise.draw()[1], each) for each in expected)


def test_noise_of_a_flow_is_added_as_diffusers_adds_it():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    clean, noise = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    theirs = scheduler.scale_noise(clean, scheduler.timesteps[3:4], noise)
    config = {"_class_name": EULER, **scheduler.config}
    assert relative(schedule.add_noise(config, clean, noise, ours("sd3", "euler", 7).noise_steps[3]), theirs) < 1e-6


def test_noise_between_whole_timesteps_is_that_of_diffusers():
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(7)
    clean, noise = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    theirs = scheduler.add_noise(clean, noise, scheduler.timesteps[3:4]) / (scheduler.sigmas[3] ** 2 + 1) ** 0.5
    levels = make_schedule(BETAS, "euler", 7)
    assert levels.noise_steps[3] % 1 and levels.noise_steps[0] == 999
    assert relative(schedule.add_noise(BETAS, clean, noise, levels.noise_steps[3]), theirs) < 1e-6


@pytest.mark.parametrize(
    ("kind", "sampler", "spacing"),
    [
        ("EulerDiscreteScheduler", "euler", "use_karras_sigmas"),
        ("EulerDiscreteScheduler", "euler", "use_exponential_sigmas"),
        ("DPMSolverMultistepScheduler", "dpm-solver++", "use_karras_sigmas"),
    ],
)
def test_images_begin_at_the_noise_of_levels_that_are_spaced_anew(kind, sampler, spacing):
    config = BETAS | {spacing: True}
    scheduler = getattr(diffusers, kind)(**config)
    scheduler.set_timesteps(12)
    clean, noise = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    for first in (3, 10):  # where timesteps lie far apart in noise
        levels = make_schedule(config, sampler, 12, strength=1 - first / 12)
        assert list(levels.timesteps) == scheduler.timesteps[first:].tolist()
        scheduler.set_begin_index(first)
        theirs = scheduler.add_noise(clean, noise, scheduler.timesteps[first : first + 1])
        if sampler == "euler":
            theirs = theirs / (scheduler.sigmas[first] ** 2 + 1) ** 0.5
        assert relative(schedule.add_noise(config, clean, noise, levels.noise_steps[0]), theirs) < 1e-6


@pytest.mark.parametrize(
    ("changes", "sampler", "steps", "said"),
    [
        ({"invert_sigmas": True}, "euler", 4, "invert_sigmas"),
        ({"use_beta_sigmas": True}, "heun", 4, "use_beta_sigmas"),
        ({"time_shift_type": "cubic", "use_dynamic_shifting": True}, "euler", 4, "time_shift_type"),
        (
            {"use_dynamic_shifting": True, "base_image_seq_len": 64, "max_image_seq_len": 64},
            "euler",
            4,
            "its base_image_seq_len 64, max_image_seq_len 64 give no shift",
        ),
        (
            {"use_dynamic_shifting": True, "max_shift": 1e6},
            "euler",
            4,
            "max_shift 1000000.0 give no shift of the noise",
        ),
        (
            {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": -9.0, "max_shift": -1.0},
            "euler",
            4,
            "base_shift -9.0, max_shift -1.0 give no shift",
        ),
        ({"prediction_type": "epsilon"}, "euler", 4, "a flow's is flow_prediction"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "auto", 4, "none of(.|\n)*: --sampler euler"),
        ({}, "pndm", 4, "pndm samples models with betas alone"),
        ({}, "euler", 0, "not within 1 .. 1000"),
        ({"_class_name": "DDIMScheduler"}, "euler", 4, "the model is a flow, and its scheduler config, DDIMSch"),
        ({"shift_terminal": 0.1}, "euler", 1, "needs 2 or more"),
    ],
)
def test_what_a_flow_does_not_follow_is_refused(changes, sampler, steps, said):
    with pytest.raises(Refused, match=said):
        ours("sd3", sampler, steps, **changes)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "TCDScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True},
        {"_class_name": "DDIMScheduler", "clip_sample": True},
    ],
)
def test_the_sampler_that_a_refusal_names_is_taken(config):
    with pytest.raises(Refused) as stop:
        make_schedule(BETAS | config, "auto", 3)
    named = re.search("--sampler ([^ ,]+)", stop.value.remedy)
    assert len(make_schedule(BETAS | config, named[1], 3)) == 3


@pytest.mark.parametrize(
    ("config", "sampler", "said"),
    [
        ({"_class_name": EULER}, "euler", "the model is a model with betas, and its scheduler config"),
        (BETAS, "heun", "heun samples flows alone"),
        ({**BETAS, "use_beta_sigmas": True}, "euler", "use_beta_sigmas(.|\n)*Name another with --sampler"),
        ({**BETAS, "use_karras_sigmas": True, "sigma_min": 0}, "dpm-solver++", "sigma_min: .* says 0, expected"),
        ({**BETAS, "use_exponential_sigmas": True, "sigma_max": "x"}, "euler", "sigma_max: .* says 'x', expected"),
        ({**BETAS, "timestep_type": "continuous"}, "euler", "timestep_type"),
        ({**BETAS, "timestep_spacing": "odd"}, "euler-ancestral", "timestep_spacing"),
        ({**BETAS, "_class_name": "LCMScheduler", "clip_sample": True}, "auto", "clip_sample=True"),
    ],
)
def test_what_a_model_with_betas_does_not_follow_is_refused(config, sampler, said):
    with pytest.raises(Refused, match=said):
        make_schedule(config, sampler, 4)


# Whole pipelines, without text encoders and autoencoder ---------------------------------------------------------------

SEEDS, SIDE = (5, 6), 64
CALL = {"num_inference_steps": 4, "height": SIDE, "width": SIDE, "output_type": "latent"}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def texts(rows: int, tokens: int, width: int) -> torch.Tensor:
    return torch.randn((rows, tokens, width), generator=torch.Generator().manual_seed(1))


def sampled(levels: schedule.Schedule, guidance: float, shape: tuple[int, int, int], predict: Callable) -> torch.Tensor:
    """Final latents of a walk from the noise of SEEDS; `predict` gets the latents and the timestep."""
    noise = schedule.ImageNoise(SEEDS, shape)
    walk = SamplerState(levels, guidance, noise.draw() * levels.noise_scale, noise.draw)
    for k, time in enumerate(levels.timesteps):
        walk.step(k, predict(walk.latents, torch.tensor(time)))
    return walk.latents


@torch.inference_mode()
def test_latents_are_those_of_the_pipeline_of_sd3():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "pos_embed_max_size": 16}
    widths = {"joint_attention_dim": 64, "caption_projection_dim": 32, "pooled_projection_dim": 64}
    network = diffusers.SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, **sizes, **widths).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    encoders = dict.fromkeys([f"{kind}{k}" for kind in ("text_encoder", "tokenizer") for k in ("", "_2", "_3")])
    pipeline = diffusers.StableDiffusion3Pipeline(transformer=network, scheduler=scheduler, vae=None, **encoders)
    pipeline.set_progress_bar_config(disable=True)
    text, pooled = texts(4, 9, 64), texts(4, 1, 64)[:, 0]
    theirs = pipeline(
        prompt_embeds=text[2:],
        negative_prompt_embeds=text[:2],
        pooled_prompt_embeds=pooled[2:],
        negative_pooled_prompt_embeds=pooled[:2],
        guidance_scale=4.0,
        generator=generators(),
        **CALL,
    ).images

    def predict(latents, time):
        return network(torch.cat([latents] * 2), text, pooled, time.expand(4)).sample

    assert relative(sampled(ours("sd3", "auto", 4), 4.0, (4, 8, 8), predict), theirs) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("family", ["flux1-dev", "flux1-schnell"])
def test_latents_are_those_of_the_pipeline_of_flux(family):
    torch.manual_seed(0)
    is_guided = family == "flux1-dev"
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    widths = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, guidance_embeds=is_guided, **sizes, **widths
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**FAMILIES[family][0])
    encoders = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    pipeline = diffusers.FluxPipeline(transformer=network, scheduler=scheduler, vae=None, **encoders)
    pipeline.set_progress_bar_config(disable=True)
    text, pooled = texts(2, 9, 32), texts(2, 1, 32)[:, 0]
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "generator": generators(), "guidance_scale": 3.5}
    theirs = pipeline._unpack_latents(pipeline(**given, **CALL).images, SIDE, SIDE, 8)
    places = pipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)

    def predict(latents, time):
        packed = pipeline._pack_latents(latents, 2, 4, 8, 8)
        output = network(
            packed,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time.expand(2) / 1000,
            guidance=torch.full([2], 3.5) if is_guided else None,
            img_ids=places,
            txt_ids=torch.zeros(9, 3),
        ).sample
        return pipeline._unpack_latents(output, SIDE, SIDE, 8)

    assert relative(sampled(ours(family, "auto", 4, 16), 3.5, (4, 8, 8), predict), theirs) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),  # SDXL
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),  # Turbo
        ("LCMScheduler", {}),
    ],
)
@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_latents_are_those_of_the_pipeline_of_sdxl(kind, changes, guidance):
    """One generator an image draws its first latents and then the noise of one call after another."""
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    ).eval()
    scheduler = getattr(diffusers, kind)(**BETAS, **changes)
    encoders = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=network, scheduler=scheduler, vae=None, add_watermarker=False, **encoders
    )
    pipeline.set_progress_bar_config(disable=True)
    rows = 4 if guidance else 2
    text, pooled = texts(4, 9, 32)[-rows:], texts(4, 1, 16)[-rows:, 0]
    negatives = {"negative_prompt_embeds": text[:2], "negative_pooled_prompt_embeds": pooled[:2]} if guidance else {}
    given = {"prompt_embeds": text[-2:], "pooled_prompt_embeds": pooled[-2:], "guidance_scale": guidance, **negatives}
    theirs = pipeline(**given, generator=generators(), **CALL).images
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]]).expand(rows, -1)}

    def predict(latents, time):
        repeated = torch.cat([latents] * (rows // 2))
        return network(repeated, time, encoder_hidden_states=text, added_cond_kwargs=added).sample

    levels = make_schedule({**scheduler.config, "_class_name": kind}, "auto", 4)
    assert relative(sampled(levels, guidance, (4, 8, 8), predict), theirs) < 1e-5


@pytest.mark.parametrize("shift", [0.1, 0.3, 3.0])
def test_unipc_begins_a_millionth_below_one_however_its_shift_rounds(shift):
    """1 becomes 1.0000000000000002, 0.9999999999999998 and 1, whose logarithm of the signal is none or far away."""
    timesteps, sigmas = unipc_levels({"shift": shift}, 4, FlowRule("uniform"), 0)
    assert timesteps[0] == 999 and sigmas[0] == float(np.float32(1 - 1e-6))
