"""bench.world.mmdit: the transformer that is trained, and its files, are those of the stock pipeline;
and what was trained so and ships as demo-dit.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from skips import long_test

from bench.world import mmdit
from bench.world.pool import CHUNK, TELLINGS, ScenePool, render_chunk
from bench.world.tokenizer import TOKENS, build_tokenizer
from datasetdm_fast import evaluate, generate, open_run
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loading.folder import DEMO_DIT
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.errors import Refused

WIDTH = 64  # of the demo's text encoder


def seeded_transformer() -> torch.nn.Module:
    net = mmdit.build_transformer(4, WIDTH)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return net.eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmdit")
    text = mmdit.build_text(build_tokenizer(folder / "tokenizer"))
    autoencoder = mmdit.build_autoencoder(4)
    autoencoder.register_to_config(shift_factor=0.25)
    mmdit.store_parts(folder, "demo", seeded_transformer(), text, autoencoder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 40])
def test_standing_zero_tokens_equal_as_many_real_ones(count):
    net, draw = seeded_transformer(), torch.Generator().manual_seed(0)
    context, pooled = torch.randn(2, 9, 2 * WIDTH, generator=draw), torch.randn(2, 2 * WIDTH, generator=draw)
    latents = torch.randn(2, 4, 16, 16, generator=draw)
    given = {"hidden_states": latents, "pooled_projections": pooled, "timestep": torch.tensor([300.0, 800.0])}
    padded = torch.cat([context, torch.zeros(2, count, 2 * WIDTH)], 1)
    expected = net(**given, encoder_hidden_states=padded).sample
    net.set_attn_processor(mmdit.CountedAttention())
    standing, bias = mmdit.zero_tokens(context, torch.full((2,), float(count)))
    result = net(**given, encoder_hidden_states=standing, joint_attention_kwargs={"attention_mask": bias}).sample
    assert torch.allclose(result, expected, atol=2e-5 * expected.abs().max())


@torch.no_grad()
def test_stock_pipeline_draws_from_the_folder(parts, tmp_path):
    assert all(path.stat().st_size < 2**24 for path in parts.glob("*.safetensors"))
    mmdit.assemble(parts, tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, **mmdit.WITHOUT_T5)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.shift_factor == 0.25
    prompt = "a red ball and a blue cube on a pink table at night"
    context, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, max_sequence_length=2)
    tokens = pipeline.tokenizer(prompt, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    own, own_pooled = mmdit.encode(pipeline.text_encoder, tokens)
    assert torch.equal(context[:, :TOKENS], own) and torch.equal(pooled, own_pooled)
    (image,) = pipeline(prompt, num_inference_steps=2, max_sequence_length=2, output_type="np").images
    assert image.shape == (128, 128, 3) and np.isfinite(image).all() and image.std() > 0


def test_text_encoder_of_the_demo_model(parts):
    """Its words mean what they mean there, also where a world has more of them."""
    from transformers import CLIPTextModel

    tokenizer = build_tokenizer(parts / "tokenizer")
    tokens = tokenizer("a red ball on a grey table", padding="max_length", return_tensors="pt").input_ids
    given = CLIPTextModel.from_pretrained(mmdit.SHIPPED / "text_encoder", dtype=torch.float32)
    output = mmdit.build_text(tokenizer)(tokens, output_hidden_states=True)
    expected = given(tokens, output_hidden_states=True)
    assert torch.allclose(output.hidden_states[-2], expected.hidden_states[-2], atol=1e-5)
    assert torch.allclose(output.text_embeds, expected.pooler_output, atol=1e-5)


def test_pool_draws_scenes_with_captions_of_theirs(tmp_path):
    tokenizer = build_tokenizer(tmp_path, mmdit.WORLDS["hard"])
    images, tokens = render_chunk("hard", tokenizer, 3)
    assert images.shape == (CHUNK, 3, 128, 128) and tokens.shape == (CHUNK, TELLINGS, TOKENS)
    pool = ScenePool(2 * CHUNK, torch.empty(0, 1, dtype=torch.int16), "cpu")
    pool.add(torch.arange(CHUNK, dtype=torch.int16)[:, None], torch.from_numpy(tokens))
    values, drawn = pool.draw(64, torch.Generator().manual_seed(0))
    first = [one.tolist() in tokens[value].tolist() for value, one in zip(values[:, 0].tolist(), drawn)]
    assert all(first) and len({*values[:, 0].tolist()}) > 40
    assert (drawn == torch.from_numpy(tokens[values[:, 0], 0]).long()).all(1).float().mean() > 0.5


def test_zeros_in_place_of_t5_are_as_many_as_the_index_says(parts, tmp_path):
    mmdit.assemble(parts, tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for entry, tokens in (({}, 77 + 256), ({"max_sequence_length": 0}, 77), ({"max_sequence_length": 512}, 589)):
        (tmp_path / "model_index.json").write_text(json.dumps(index | entry))
        engine = build_engine("torch", load_model(str(tmp_path)), {})
        assert engine.encode_text(["a red ball"]).context.shape == (1, tokens, 2 * WIDTH)
        assert engine.model.levels[0].tokens == tokens
    for wrong in (-1, 513, "many", None):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"max_sequence_length": wrong}))
        with pytest.raises(Refused, match="max_sequence_length is .*, expected 0 to 512 tokens"):
            load_model(str(tmp_path))


def test_demo_dit_makes_images_and_labels(tmp_path):
    line = ["--model", "demo-dit", "--number", "2", "--steps", "2", "--out", str(tmp_path / "run"), "--quiet"]
    assert generate.main(line) == 0
    samples = list(open_run(tmp_path / "run"))
    assert len(samples) == 2 and all(sample.image.shape == (128, 128, 3) for sample in samples)
    assert {*open_run(tmp_path / "run").tasks} == {"semantic", "instance", "depth", "pose"}
    assert all(np.isfinite(sample.depth.metres).all() for sample in samples)


def test_demo_dit_draws_what_the_stock_pipeline_draws():
    prompt = "a red ball and a blue cube on a pink table"
    ours = Pipeline.from_pretrained("demo-dit")(prompt, seeds=[1], steps=2)
    pipeline = StableDiffusion3Pipeline.from_pretrained(DEMO_DIT, **mmdit.WITHOUT_T5)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt, num_inference_steps=2, guidance_scale=2.5, max_sequence_length=0,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    difference = np.asarray(ours.images[0], int) - np.asarray(theirs.images[0], int)
    assert np.abs(difference).max() <= 1


@long_test
def test_decoders_of_demo_dit_label_unseen_scenes(tmp_path, capsys):
    assert evaluate.main(["--model", "demo-dit", "--data", "demo:24@900000", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["semantic"]["miou"] > 0.93 and figures["instance"]["ap50"] > 0.95
    assert figures["depth"]["absrel"] < 0.05 and figures["open-vocabulary"]["miou"] > 0.8
