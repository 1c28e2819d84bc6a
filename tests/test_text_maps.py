"""Labels from the attention of image to text in one call: Seg4Diff's maps, against a plain transcription."""

import copy
import json
import math

import numpy as np
import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from tiny_pipelines import SIZE

from datasetdm_fast import Pipeline, audit, generate, label, open_run
from datasetdm_fast.data import AttentionSums, Text
from datasetdm_fast.engine.engines import build_engine
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.calls import call_text

PROMPTS = ["a photo of the cat", "the house"]
FORMS = {"sd3": ({"layers": 3}, 4.0), "flux1": ({"layers": 4, "singles": 2}, 3.0)}


@pytest.fixture(params=FORMS, scope="module")
def folder(request, tmp_path_factory):
    sizes, guidance = FORMS[request.param]
    place = tmp_path_factory.mktemp(request.param) / "model"
    return tiny_pipelines.save(place, request.param, **sizes), request.param, guidance


def transcribed(products, family, blocks, images, cells, text):
    """M(x, j): the mean over heads and blocks of softmax(Q K^T / sqrt d) from image cell x to text token j."""
    maps = []
    for block in blocks:
        query, key = (part[-images:].double().numpy() for part in products[block])
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        image, tokens = (slice(0, cells), slice(cells, cells + text))
        if family == "flux1":
            image, tokens = slice(text, text + cells), slice(0, text)
        maps.append(shares[:, :, image, tokens].mean(1))
    return np.mean(maps, 0)


def test_maps_are_those_of_the_published_formula(folder, monkeypatch):
    place, family, guidance = folder
    model = load_model(str(place), size=SIZE)
    engine, side, tokens = TorchEngine(model, device="cpu"), model.levels[0].side, model.levels[0].tokens
    products, product = [], F.scaled_dot_product_attention

    def watched(query, key, *rest, **options):
        if key.shape[2] > side**2:  # else it is an attention of the image alone
            products.append((query, key))
        return product(query, key, *rest, **options)

    latents = torch.randn(2, model.latents.channels, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
    text = call_text(engine, PROMPTS, guidance)
    zero = AttentionSums(torch.zeros(2, side**2, 0), torch.zeros(2, side**2, tokens))
    output, sums = engine.denoise_and_average(latents, 500.0, text, text, zero)
    torch.testing.assert_close(output, engine.denoise(latents, 500.0, text), rtol=0, atol=0)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        engine.denoise(latents, 500.0, text)
    assert len(products) == len(engine.reference.attentions())
    blocks = model.defaults.attention.blocks
    assert blocks == ((1,) if family == "sd3" else (2, 3))
    length = text.context.shape[1]
    wanted = transcribed(products, family, blocks, 2, side**2, length)
    np.testing.assert_allclose(sums.tokens[..., :length].numpy(), wanted, rtol=0, atol=2e-6)
    assert not sums.tokens[..., length:].any() and wanted.sum(-1).max() < 1


def concepts_of(blocks, seen, concepts, embed):
    """ConceptAttention as published (Helbling et al. 2025), block by block and in double precision; `seen` are the
    arguments of each block in a call without concepts, which do not depend on these.
    """
    c, maps = embed(concepts), []
    for number, (block, (x, p, time, turns)) in enumerate(zip(blocks, seen, strict=True)):
        attention = block.attn

        def heads(layer, norm, tokens, attention=attention):
            split = layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        def turn(tokens, turns=turns):
            if turns is None:
                return tokens
            cosine, sine = (part[-tokens.shape[2] :].double() for part in turns)
            even, odd = tokens.unflatten(-1, (-1, 2)).unbind(-1)
            return tokens * cosine + torch.stack([-odd, even], -1).flatten(-2) * sine

        def attend(query, key, value):
            return (query @ key.mT / key.shape[-1] ** 0.5).softmax(-1) @ value

        is_last = getattr(block, "context_pre_only", False)  # of SD3: nothing reads its text after the attention
        own, prompt = (
            block.norm1_context(tokens, time) if is_last else block.norm1_context(tokens, emb=time) for tokens in (c, p)
        )
        own, *vectors = (own,) if is_last else own
        image, prompt = block.norm1(x, emb=time)[0], prompt if is_last else prompt[0]
        x_layers = (attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k), (attention.to_v, None)
        text_layers = (attention.add_q_proj, attention.norm_added_q), (attention.add_k_proj, attention.norm_added_k)
        text_layers += ((attention.add_v_proj, None),)
        q_x, k_x, v_x = (heads(*layer, image) for layer in x_layers)
        q_x, k_x = turn(q_x), turn(k_x)
        _, k_p, v_p = (heads(*layer, prompt) for layer in text_layers)
        q_c, k_c, v_c = (heads(*layer, own) for layer in text_layers)
        o_x = attend(q_x, torch.cat([k_x, k_p], 2), torch.cat([v_x, v_p], 2)).transpose(1, 2).flatten(2)
        o_c = attend(q_c, torch.cat([k_x, k_c], 2), torch.cat([v_x, v_c], 2)).transpose(1, 2).flatten(2)
        if 2 * number >= len(blocks) - 1:
            maps.append((o_x @ o_c.mT).softmax(-1))
        if is_last:
            break
        gate, shift, scale, fed = vectors
        c = c + gate[:, None] * attention.to_add_out(o_c)
        c = c + fed[:, None] * block.ff_context(block.norm2_context(c) * (1 + scale[:, None]) + shift[:, None])
    return torch.stack(maps).mean(0)


def test_concepts_are_those_of_the_published_formula(folder):
    place, family, guidance = folder
    model = load_model(str(place), size=SIZE)
    engine, side = TorchEngine(model, device="cpu"), model.levels[0].side
    latents = torch.randn(2, model.latents.channels, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
    text = call_text(engine, PROMPTS, guidance)
    concepts = Text(torch.randn(2, 3, text.context.shape[-1], generator=torch.Generator().manual_seed(1)))
    zero = AttentionSums(torch.zeros(2, side**2, 0), torch.zeros(2, side**2, 3))
    output, sums = engine.denoise_and_average(latents, 500.0, text, concepts, zero)
    plain = engine.denoise(latents, 500.0, text)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-6)  # the image does not see them
    network = copy.deepcopy(model.modules["transformer"]).double()
    blocks, seen = list(network.transformer_blocks), []

    def watch(module, arguments, options):
        names = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
        seen.append(tuple(options.get(name, None) for name in names))

    with torch.no_grad():
        engine.reference.network, kept = network, engine.reference.network
        hooks = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks]
        engine.reference.predict(latents.double(), 500.0, text.map(torch.Tensor.double))
        for hook in hooks:
            hook.remove()
        engine.reference.network, rows = kept, len(text) // 2
        wanted = concepts_of(blocks, seen, concepts.context.double().repeat(rows, 1, 1), network.context_embedder)
    torch.testing.assert_close(sums.tokens.double(), wanted[-2:], rtol=0, atol=2e-5)
    fast = build_engine("fast", model, {}, device="cpu")
    ours, theirs = fast.denoise_and_average(latents, 500.0, text, concepts, zero)
    torch.testing.assert_close(theirs.tokens, sums.tokens, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    _, alone = engine.denoise_and_average(latents[1:], 500.0, text[1::2], concepts[1:], zero_of(zero))
    torch.testing.assert_close(alone.tokens[0], sums.tokens[1], rtol=0, atol=1e-6)


def zero_of(sums):
    return AttentionSums(sums.cells[:1], sums.tokens[:1])


def test_a_run_and_pictures_get_labels_of_the_words_of_their_prompts(folder, tmp_path, capsys):
    place, family, guidance = folder
    run, listed = tmp_path / "run", tmp_path / "prompts.txt"
    listed.write_text("\n".join(PROMPTS))
    line = ["--model", str(place), "--size", str(SIZE), "--engine", "torch", "--labeller", "attention", "--quiet"]
    made = [*line, "--classes", "cat,house", "--prompts", str(listed), "--steps", "3", "--guidance", str(guidance)]
    assert generate.main([*made, "--number", "2", "--out", str(run)]) == 0
    assert audit.main([str(run)]) == 0
    with open_run(run) as samples:
        assert [sample.classes for sample in samples] == [("cat",), ("house",)]
        for number, sample in enumerate(samples, 1):
            assert set(np.unique(sample.attention.labels)) <= {0, number, 255} and number in sample.attention.labels
    recipe = json.loads((run / "run.json").read_text())["sampling"]["attention"]
    assert recipe["timestep"] == 500 and recipe["blocks"]

    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({f"{index:08d}.png": prompt for index, prompt in enumerate(PROMPTS)}))
    line += ["--classes", "cat,house", "--captions", str(captions), "--timesteps", "300,500"]
    assert label.main([str(run / "images"), *line, "--out", str(tmp_path / "labels")]) == 0
    with open_run(tmp_path / "labels") as samples:
        assert all(sample.attention.labels.any() for sample in samples)

    asked = [*made, "--ask", "all", "--number", "2"]
    assert generate.main([*asked, "--out", str(tmp_path / "all")]) == 0
    with open_run(tmp_path / "all") as samples:
        assert all(sample.attention.classes == ("background", "cat", "house") for sample in samples)
    capsys.readouterr()
    for names in (",".join(f"w{k}" for k in range(2000)), *(["\u65e5"] if family == "flux1" else [])):
        assert generate.main([*asked, "--classes", names, "--out", str(tmp_path / "refused")]) == 2
        assert "--classes: " in capsys.readouterr().err
    for flags, words in (
        (["--exponent", "2"], "--exponent 2"),
        (["--parity", "dataset-diffusion"], "--parity dataset-diffusion"),
        (["--self-cells", "3"], "--self-cells 3"),
    ):
        assert generate.main([*made, *flags, "--number", "2", "--out", str(tmp_path / "refused")]) == 2
        assert words in capsys.readouterr().err


def test_things_of_the_demo_are_found_without_a_decoder():
    pipe = Pipeline.from_pretrained("demo-dit", engine="torch", size=128)
    words = ("ball", "cube", "star", "tree")
    prompts = ["a red ball and a blue cube on a brown table", "a green star and a white tree on a grey table"]
    out = pipe(prompts, seeds=[5, 6], tasks=("semantic", "attention"), classes=words, steps=8)
    shares = []
    for found, decoded in zip(out.attention, out.semantic, strict=True):
        for word in set(words) & set(decoded.classes):
            one, other = found.labels == found.classes.index(word), decoded.labels == decoded.classes.index(word)
            if other.sum() > 100:
                shares.append((one & other).sum() / (one | other).sum())
    assert len(shares) >= 3 and np.mean(shares) > 0.5, shares


def test_what_flux_schnell_cannot_label_is_refused(tmp_path, capsys):
    folder = tiny_pipelines.save(tmp_path / "model", "flux1", is_dev=False)
    line = ["--model", str(folder), "--size", str(SIZE), "--prompts", "a cat", "--labeller", "attention", "--quiet"]
    for flags, said in (
        (["--ask", "all", "--classes", "\u65e5"], "--classes: no token says '\u65e5'"),
        (["--classes", "cat", "--parity", "dataset-diffusion"], "--parity dataset-diffusion: of this model"),
    ):
        assert generate.main([*line, *flags, "--out", str(tmp_path / "refused")]) == 2
        assert said in capsys.readouterr().err
