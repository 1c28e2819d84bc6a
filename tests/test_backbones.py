"""Families of models: their references against the stock pipelines of diffusers, and their captures."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import SIZE, TOKENS
from torch import nn

from datasetdm_fast.command_line.run_report import describe_cut
from datasetdm_fast.data import join_texts
from datasetdm_fast.engine.backbones import flow_models, flux1, flux2_klein, qwen_image, sd3, sdxl, z_image
from datasetdm_fast.engine.backbones.joint_attention import pack
from datasetdm_fast.engine.backbones.sdxl_reference import SDXLReference
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.prompts import fit_prompt
from datasetdm_fast.errors import Refused
from datasetdm_fast.plugins import load_place

RECORDS = {
    "sdxl": sdxl.SDXL,
    "sd3": sd3.SD3,
    "flux1": flux1.FLUX1,
    "flux2-klein": flux2_klein.FLUX2_KLEIN,
    "z-image": z_image.Z_IMAGE,
    "qwen-image": qwen_image.QWEN_IMAGE,
}
PROMPTS = ["a photo of the cat", "a", "the photo of a house, a photo of a photo"]
STEPS, GUIDANCE = 3, 3.0
# family, sizes of its tiny pipeline, options of its stock call
CASES = {
    "sd3": ("sd3", {}, {"guidance_scale": GUIDANCE}),
    "sd3 without T5": ("sd3", {"has_t5": False, "layers": 3, "width": 48}, {"guidance_scale": GUIDANCE}),
    "flux1 dev": ("flux1", {}, {"guidance_scale": GUIDANCE}),
    "flux1 schnell": (
        "flux1",
        {"is_dev": False, "layers": 1, "singles": 4},
        {"max_sequence_length": 256, "guidance_scale": 0.0},
    ),
    "klein": ("flux2-klein", {}, {}),
    "klein base": ("flux2-klein", {"is_distilled": False, "layers": 2, "singles": 2}, {"guidance_scale": GUIDANCE}),
    "z-image": ("z-image", {}, {"guidance_scale": GUIDANCE - 1}),
    "z-image turbo": ("z-image", {"layers": 5}, {"guidance_scale": 0.0}),
    "qwen-image": (
        "qwen-image",
        {},
        {"true_cfg_scale": GUIDANCE, "negative_prompt": [""] * len(PROMPTS), "max_sequence_length": 512},
    ),
}


def model_of(pipeline, family, halves=2, size=SIZE):
    """What a reference reads of a model, of the parts of a pipeline."""
    record = RECORDS[family]
    parts = {name: part for name, part in pipeline.components.items() if name in record.parts and part is not None}
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    tokenizers = {name: part for name, part in parts.items() if name not in modules}
    configs = {name: part.config for name, part in modules.items()}
    configs |= {"scheduler": pipeline.scheduler.config, "model_index": pipeline.config}
    guidance = record.guidance(configs)
    return SimpleNamespace(
        backbone=record,
        modules=modules,
        tokenizers=tokenizers,
        configs=configs,
        latents=record.latents(configs),
        guidance=guidance,
        levels=record.levels(configs, size, halves if guidance == "cfg" else 1),
        size=size,
    )


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A tiny pipeline, its reference, and what a call of the pipeline gives."""
    family, sizes, options = CASES[request.param]
    pipeline = tiny_pipelines.build(family, **sizes)
    model = model_of(pipeline, family)
    drawn = {}

    def keep(pipeline, step, timestep, tensors):
        drawn["latents"] = tensors["latents"]
        return {}

    images = pipeline(
        prompt=list(PROMPTS),
        generator=[generator(seed) for seed in range(3)],
        output_type="np",
        callback_on_step_end=keep,
        **{"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, **options},
    ).images
    return SimpleNamespace(
        name=request.param,
        pipeline=pipeline,
        options=options,
        model=model,
        reference=load_place(model.backbone.reference)(model),
        is_cfg=model.guidance == "cfg" and options.get("guidance_scale") != 0.0,
        sigmas=pipeline.scheduler.sigmas,
        latents=drawn["latents"],
        images=images,
    )


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def noise_of(model, seeds):
    space = model.latents
    side = model.size // space.pixels
    return torch.stack([torch.randn(space.channels, side, side, generator=generator(seed)) for seed in seeds])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def text_of(case, prompts):
    reference = case.reference
    text = reference.encode(prompts)
    if case.is_cfg:
        text = join_texts([reference.encode([""] * len(prompts)), text])
    return replace(text, guidance=case.options.get("guidance_scale", case.options.get("true_cfg_scale")))


def sample(case, prompts, noise):
    """Latents by calls of the reference at the pipeline's noise levels."""
    text = text_of(case, prompts)
    for sigma, following in zip(case.sigmas, case.sigmas[1:]):
        output = case.reference.predict(noise, 1000 * sigma.item(), text)
        if len(output) > len(noise):
            without, with_text = output.chunk(2)
            output = without + GUIDANCE * (with_text - without)
        noise = noise + (following - sigma) * output
    return noise


def stock_embeddings(case):
    """Context, pooled text and mask of the prompts, by the pipeline's own encode_prompt."""
    length = {name: value for name, value in case.options.items() if name == "max_sequence_length"}
    family = case.model.backbone.name
    if family == "sd3":
        context, _, pooled, _ = case.pipeline.encode_prompt(PROMPTS, None, None, **length)
        return context, pooled, None
    if family == "flux1":
        context, pooled, _ = case.pipeline.encode_prompt(PROMPTS, **length)
        return context, pooled, None
    if family == "flux2-klein":
        return case.pipeline.encode_prompt(PROMPTS, **length)[0], None, None
    if family == "qwen-image":
        context, mask = case.pipeline.encode_prompt(PROMPTS, **length)
        return context, None, mask.bool()
    rows, _ = case.pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, **length)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(max(lengths)) < lengths[:, None]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), None, mask


def test_prompts_are_encoded_as_the_stock_pipeline_does(case):
    text = case.reference.encode(PROMPTS)
    for actual, expected in zip((text.context, text.pooled, text.mask), stock_embeddings(case)):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_latents_and_images_are_those_of_the_stock_pipeline(case):
    latents = sample(case, PROMPTS, noise_of(case.model, range(3)))
    expected = latents
    if case.latents.dim() == 3:  # packed
        expected = latents.flatten(2).mT if case.model.latents.pixels == 16 else pack(latents)
    torch.testing.assert_close(expected, case.latents, rtol=0, atol=1e-5)
    decoded = (case.reference.decode(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert np.abs(decoded.numpy() - case.images).max() < 1e-4


def test_an_image_is_encoded_where_it_is_decoded_from(case):
    pixels = torch.rand(2, 3, SIZE, SIZE, generator=generator(1)) * 2 - 1
    latents = case.reference.encode_image(pixels, None)
    assert latents.shape == noise_of(case.model, (0, 1)).shape
    vae, side = case.model.modules["vae"], SIZE
    numbers = vae.encode(pixels.unsqueeze(2) if case.name == "qwen-image" else pixels).latent_dist.mode()
    direct = vae.decode(numbers, return_dict=False)[0].reshape(2, 3, side, side)
    torch.testing.assert_close(case.reference.decode(latents), direct, rtol=0, atol=1e-4)
    drawn = case.reference.encode_image(pixels, [generator(3), generator(4)])
    alone = case.reference.encode_image(pixels[1:], [generator(4)])
    torch.testing.assert_close(drawn[1:], alone, rtol=0, atol=1e-4)
    assert (drawn - latents).abs().max() > 1e-3


def test_a_batch_gives_what_its_images_give_alone(case):
    noise = noise_of(case.model, range(3))
    together = sample(case, PROMPTS, noise)
    for image, prompt in enumerate(PROMPTS):
        alone = sample(case, [prompt], noise[image : image + 1])
        torch.testing.assert_close(alone[0], together[image], rtol=0, atol=1e-5)


def value_places(attention, text):
    """The linear layer that makes the values of the text, and of its output the rows and columns where they are."""
    if getattr(attention, "add_v_proj", None) is not None:
        return attention.add_v_proj, slice(None), slice(None)
    if hasattr(attention, "to_v"):
        return attention.to_v, text, slice(None)
    width = attention.inner_dim
    return attention.to_qkv_mlp_proj, text, slice(2 * width, 3 * width)


class Watch:
    """Of one call: what an attention's first layer reads, the values of its text, and what it passes to its last."""

    def __init__(self, attention, text, has_text):
        self.text, self.has_text = text, has_text
        values, self.rows, self.columns = value_places(attention, text)
        first = getattr(attention, "to_q", None) or attention.to_qkv_mlp_proj
        last = getattr(attention, "to_out", None)
        self.hooks = [
            first.register_forward_pre_hook(lambda _, inputs: setattr(self, "input", inputs[0])),
            values.register_forward_hook(self.see_values),
        ]
        if last is None:
            self.hooks.append(attention.register_forward_hook(lambda _, inputs, out: setattr(self, "output", out)))
        else:
            last = last if isinstance(last, nn.Linear) else last[0]
            self.hooks.append(last.register_forward_pre_hook(lambda _, inputs: setattr(self, "output", inputs[0])))

    def see_values(self, module, inputs, output):
        output = output.clone()
        self.values = output[:, self.rows, self.columns].clone()
        if not self.has_text:
            output[:, self.rows, self.columns] = 0
        return output

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def test_captures_are_the_input_of_blocks_and_their_attention_to_text(case):
    reference, model = case.reference, case.model
    noise, text = noise_of(model, range(3)), text_of(case, PROMPTS)
    plain = reference.predict(noise, 500.0, text)
    with reference.capturing() as captures:
        output = reference.predict(noise, 500.0, text)
    torch.testing.assert_close(output, plain, rtol=0, atol=0)
    output = reference.predict(noise, 500.0, replace(text, guidance=None if case.is_cfg else text.guidance))
    assert len(output) == len(text)
    (capture,) = captures
    for level, features, maps in zip(model.levels, capture.features, capture.maps, strict=True):
        assert [tuple(part.shape) for part in features] == [
            (3, count * level.halves, level.side, level.side) for count in level.features
        ]
        assert [tuple(part.shape) for part in maps] == [
            (3, heads, level.side**2, level.tokens) for heads in level.heads
        ]
    clean = noise - 0.5 * output[-3:]
    expected = torch.nn.functional.pixel_shuffle(clean, 2) if model.latents.pixels == 16 else clean
    torch.testing.assert_close(capture.features[-1][0], expected, rtol=0, atol=0)
    assert model.levels[-1].side == SIZE // 8

    attentions, side = reference.attentions(), model.levels[0].side
    image, places = reference.places(side * side, text.context.shape[1])
    reads = [block for level in joint_blocks(len(attentions)) for block in level]
    seen = [pair for level in zip(capture.features[:3], capture.maps[:3]) for pair in zip(*level)]
    for block, (features, maps) in zip(reads, seen, strict=True):
        attention = attentions[block]
        with Watch(attention, places, True) as full:
            reference.predict(noise, 500.0, text)
        with Watch(attention, places, False) as without:
            reference.predict(noise, 500.0, text)
        tokens = full.input if full.input.shape[1] == side * side else full.input[:, image]
        torch.testing.assert_close(features, tokens[-3:].mT.unflatten(2, (side, side)), rtol=0, atol=0)
        width = full.values.shape[-1]
        # the product is linear in its values: without those of the text it lacks what it read there
        difference = (full.output - without.output)[-3:, ..., :width]
        difference = difference if difference.shape[1] == side * side else difference[:, image]
        values = full.values[-3:].unflatten(2, (maps.shape[1], -1)).transpose(1, 2)
        count = values.shape[2]
        read = (maps[..., :count] @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(read, difference, rtol=0, atol=1e-4)
        assert maps[..., count:].abs().max() == 0 if maps.shape[-1] > count else True
        assert 0.01 < maps.sum(-1).mean() < 0.99


def test_t5_reads_what_clip_cuts_off_as_in_diffusers(tmp_path):
    pipeline = tiny_pipelines.build("sd3")
    pipeline.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), size=SIZE)
    prompt = "the cat, " + "a photo of a photo, " * 20 + "the house"
    tokenizer, tokens = model.tokenizer, len(pipeline.tokenizer(prompt).input_ids)
    assert TOKENS < tokens < len(pipeline.tokenizer_3(prompt).input_ids) <= 256
    assert fit_prompt(prompt, tokenizer, "line 1", ["cat"]) == prompt
    with pytest.raises(Refused, match=f"cutting it to {TOKENS} tokens would lose the class word 'house'"):
        fit_prompt(prompt, tokenizer, "line 1", ["cat", "house"])
    with pytest.raises(Refused, match=r"tokens, at most 256 fit"):
        fit_prompt(prompt * 2, tokenizer, "line 1", truncate=False)
    cut = fit_prompt(prompt * 2, tokenizer, "line 1", ["cat"], truncate=True)
    assert cut in prompt * 2 and len(prompt) / 2 < len(cut) < len(prompt * 2)
    requests = {0: SimpleNamespace(prompt=prompt), 1: SimpleNamespace(prompt="a cat")}
    job = SimpleNamespace(
        engine=SimpleNamespace(model=model), plan=SimpleNamespace(number=2, request=requests.__getitem__)
    )
    assert describe_cut(job) == f"of 1 of the first 2 prompts CLIP reads {TOKENS} tokens, and T5 all"
    context, _, pooled, _ = pipeline.encode_prompt(prompt, None, None)
    for name in ("torch", "fast"):
        text = build_engine(name, model, device="cpu").encode_text([prompt])
        torch.testing.assert_close(text.context, context, rtol=0, atol=1e-5)
        torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-5)
    assert getattr(load_model("demo-dit").tokenizer, "longer", None) is None  # a model without T5


def joint_blocks(depth):
    return {
        2: ((0, 1), (0,), (1,)),
        3: ((1,), (0,), (2,)),
        4: ((1, 2), (1,), (3,)),
        5: ((1, 2), (1,), (3,)),
    }[depth]


def test_blocks_that_decoders_read_lie_at_quarters_of_the_depth():
    blocks_read = flow_models.blocks_read
    assert blocks_read(24) == ((9, 12), (6,), (18,))
    assert blocks_read(57) == ((21, 28), (14,), (42,))
    assert {depth: blocks_read(depth) for depth in (2, 3, 4, 5)} == {
        depth: joint_blocks(depth) for depth in (2, 3, 4, 5)
    }


SDXL_CASES = {
    "guided": ({}, GUIDANCE),
    "without guidance": ({"width": 48, "depths": (0, 2, 1)}, 1.0),
    "embedded guidance": ({"guidance_embedding": 32}, 7.5),
}


@pytest.fixture(params=SDXL_CASES, scope="module")
def xl(request):
    sizes, guidance = SDXL_CASES[request.param]
    pipeline = tiny_pipelines.build("sdxl", **sizes)
    model = model_of(pipeline, "sdxl", halves=2 if guidance > 1 else 1)
    is_cfg = model.levels[0].halves == 2
    return SimpleNamespace(
        pipeline=pipeline, model=model, reference=SDXLReference(model), guidance=guidance, is_cfg=is_cfg
    )


def xl_text(xl, prompts):
    text = xl.reference.encode(prompts)
    text = join_texts([xl.reference.encode([""] * len(prompts)), text]) if xl.is_cfg else text
    return replace(text, guidance=xl.guidance)


def xl_sample(xl, prompts, noise):
    scheduler, text = xl.pipeline.scheduler, xl_text(xl, prompts)
    scheduler.set_timesteps(STEPS)
    for timestep in scheduler.timesteps:
        output = xl.reference.predict(noise, float(timestep), text)
        if xl.is_cfg:
            without, with_text = output.chunk(2)
            output = without + xl.guidance * (with_text - without)
        noise = scheduler.step(output, timestep, noise, return_dict=False)[0]
    return noise


def test_sdxl_encodes_prompts_as_the_stock_pipeline_does(xl):
    text, empty = xl.reference.encode(PROMPTS), xl.reference.encode([""] * 3)
    context, negative, pooled, negative_pooled = xl.pipeline.encode_prompt(list(PROMPTS))
    for actual, expected in zip(
        (text.context, text.pooled, empty.context, empty.pooled), (context, pooled, negative, negative_pooled)
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_sdxl_draws_the_latents_of_the_stock_pipeline(xl):
    options = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "guidance_scale": xl.guidance}
    generators = [generator(seed) for seed in range(3)]
    expected = xl.pipeline(list(PROMPTS), generator=generators, output_type="latent", **options).images
    noise = noise_of(xl.model, range(3))
    latents = xl_sample(xl, PROMPTS, noise)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    for image, prompt in enumerate(PROMPTS):
        alone = xl_sample(xl, [prompt], noise[image : image + 1])
        torch.testing.assert_close(alone[0], latents[image], rtol=0, atol=1e-5)
    pixels = xl.pipeline.vae.decode(expected / 0.21, return_dict=False)[0]
    torch.testing.assert_close(xl.reference.decode(latents), pixels, rtol=0, atol=1e-4)


def test_sdxl_captures_features_and_a_map_a_transformer(xl):
    reference, unet, levels = xl.reference, xl.pipeline.unet, xl.model.levels
    noise, text = noise_of(xl.model, range(3)), xl_text(xl, PROMPTS)
    seen, read = {}, {}

    def see(name):
        return lambda _, inputs, output: seen.update({name: output[0] if isinstance(output, tuple) else output})

    def see_attention(name):
        def hook(_, inputs, options, output):
            read[name] = inputs[0], options["encoder_hidden_states"]

        return hook

    hooks = [module.register_forward_hook(see(name)) for name, module in unet.named_modules()]
    hooks += [
        module.register_forward_hook(see_attention(name), with_kwargs=True)
        for name, module in unet.named_modules()
        if name.endswith("attn2")
    ]
    plain = reference.predict(noise, 500.0, text)
    for hook in hooks:
        hook.remove()
    with reference.capturing() as captures:
        output = reference.predict(noise, 500.0, text)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)
    (capture,) = captures
    halves = 2 if xl.is_cfg else 1
    for level, features, maps in zip(levels, capture.features, capture.maps, strict=True):
        assert level.halves == halves
        assert [tuple(part.shape) for part in features] == [
            (3, halves * count, level.side, level.side) for count in level.features
        ]
        assert [tuple(part.shape) for part in maps] == [
            (3, heads, level.side**2, level.tokens) for heads in level.heads
        ]
    for place, name in {
        (0, 0): "mid_block",
        (1, 0): "down_blocks.1.downsamplers.0",
        (1, 2): "down_blocks.2.attentions.1",
        (1, 5): "up_blocks.0.attentions.2",
        (2, 3): "up_blocks.0.upsamplers.0",
        (3, 0): "conv_in",
        (3, 6): "up_blocks.2.resnets.2",
    }.items():
        expected = torch.cat(seen[name].chunk(halves), 1)
        torch.testing.assert_close(capture.features[place[0]][place[1]], expected, rtol=0, atol=1e-5)
    for place, name in {
        (0, 0): "mid_block.attentions.0",
        (1, 1): "up_blocks.0.attentions.1",
        (1, 3): "down_blocks.2.attentions.0",
        (2, 4): "down_blocks.1.attentions.1",
    }.items():
        blocks = unet.get_submodule(name).transformer_blocks
        maps = []
        for number, block in enumerate(blocks):
            hidden, context = read[f"{name}.transformer_blocks.{number}.attn2"]
            query, key = (
                layer(part[-3:]).unflatten(2, (block.attn2.heads, -1)).transpose(1, 2)
                for layer, part in ((block.attn2.to_q, hidden), (block.attn2.to_k, context))
            )
            maps.append((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
        expected = torch.stack(maps).mean(0)
        torch.testing.assert_close(capture.maps[place[0]][place[1]], expected, rtol=0, atol=1e-5)
