"""Labels from the attention of image to text in one call: Seg4Diff's maps, against a plain transcription."""

import copy
import inspect
import json
import math
import unicodedata

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
from datasetdm_fast.engine.labels.class_tables import token_places
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.calls import call_text
from datasetdm_fast.engine.loop.class_prompts import class_columns, concept_places
from datasetdm_fast.engine.loop.prompts import count_tokens, fit_prompt
from datasetdm_fast.errors import Refused

pytestmark = pytest.mark.usefixtures("one_engine_of_a_kind")

PROMPTS = ["a photo of the cat", "the house"]
FORMS = {
    "sd3": ({"layers": 3}, 4.0),
    "flux1": ({"layers": 4, "singles": 2}, 3.0),
    "flux2-klein": ({"layers": 4, "singles": 2, "is_distilled": False}, 4.0),
    "z-image": ({"layers": 3}, 4.0),
    "qwen-image": ({"layers": 3}, 4.0),
}


@pytest.fixture(params=FORMS, scope="module")
def folder(request, tmp_path_factory):
    sizes, guidance = FORMS[request.param]
    place = tmp_path_factory.mktemp(request.param) / "model"
    return tiny_pipelines.save(place, request.param, **sizes), request.param, guidance


def transcribed(products, blocks, images, image, tokens):
    """M(x, j): the mean over heads and blocks of softmax(Q K^T / sqrt d) from image cell x to text token j."""
    maps = []
    for block in blocks:
        query, key = (part[-images:].double().numpy() for part in products[block][:2])
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        if (mask := products[block][2]) is not None:
            scores = np.where(mask[-images:].numpy(), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        maps.append(shares[:, :, image, tokens].mean(1))
    return np.mean(maps, 0)


def test_maps_are_those_of_the_published_formula(folder, monkeypatch):
    place, family, guidance = folder
    model = load_model(str(place), size=SIZE)
    engine, side, tokens = TorchEngine(model, device="cpu"), model.levels[0].side, model.levels[0].tokens
    products, product = [], F.scaled_dot_product_attention

    def watched(query, key, *rest, attn_mask=None, **options):
        products.append((query, key, attn_mask))
        return product(query, key, *rest, attn_mask=attn_mask, **options)

    cells = SIZE // model.latents.pixels
    latents = torch.randn(2, model.latents.channels, cells, cells, generator=torch.Generator().manual_seed(0))
    text = call_text(engine, PROMPTS, guidance)
    zero = AttentionSums(torch.zeros(2, side**2, 0), torch.zeros(2, side**2, tokens))
    output, sums = engine.denoise_and_average(latents, 500.0, text, text, zero)
    torch.testing.assert_close(output, engine.denoise(latents, 500.0, text), rtol=0, atol=0)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watched)
        engine.denoise(latents, 500.0, text)
    longest = max(key.shape[2] for _, key, _ in products)
    products = [seen for seen in products if seen[1].shape[2] == longest]  # others are of image or text alone
    assert len(products) == len(engine.reference.attentions())
    blocks = model.defaults.attention.blocks
    assert blocks == ((2, 3) if family.startswith("flux") else (1,))
    length = longest - side**2
    begin = {"sd3": side**2, "z-image": 32}.get(family, 0)  # of the text; Z-Image fills 16 cells up to 32
    image = slice(0, side**2) if begin else slice(length, longest)
    wanted = transcribed(products, blocks, 2, image, slice(begin, begin + length - (family == "z-image") * 16))
    length = wanted.shape[-1]
    np.testing.assert_allclose(sums.tokens[..., :length].numpy(), wanted, rtol=0, atol=2e-6)
    assert not sums.tokens[..., length:].any() and wanted.sum(-1).max() < 1
    _, fast = build_engine("fast", model, {}, device="cpu").denoise_and_average(latents, 500.0, text, text, zero)
    np.testing.assert_allclose(fast.tokens[..., :length].numpy(), wanted, rtol=0, atol=5e-6)


CAUSAL = ("flux2-klein", "z-image", "qwen-image")


@pytest.mark.parametrize("family", CAUSAL)
def test_a_word_is_found_within_the_chat_that_holds_the_prompt(family, tmp_path):
    model = load_model(str(tiny_pipelines.save(tmp_path / "model", family)), size=SIZE)
    engine = TorchEngine(model, device="cpu")

    def first_change(prompt, other):
        rows = [engine.encode_text([text]).context[0] for text in (prompt, other)]
        length = min(map(len, rows))
        return int((rows[0][:length] - rows[1][:length]).abs().amax(-1).gt(1e-6).nonzero()[0])

    # a token's states depend on those before it alone; the words stand in the chats' own text, too
    for prompt, other, word, count in (
        ("A photo of two Cats.", "A photo of two dogs.", "cat", 4),
        ("user", "vser", "user", 4),
        ("the color", "the bolor", "color", 5),
    ):
        ((_, places),) = class_columns(prompt, (word,), model.tokenizer, by_words=False)
        begin = first_change(prompt, other)
        assert places == tuple(range(begin, begin + count)), (prompt, places, begin)
        assert token_places(prompt, (word,), model.tokenizer, 512)[word] == places
    assert concept_places("cat", model.tokenizer)[0] == first_change("cat", "bat")
    for find in (
        lambda: concept_places("", model.tokenizer),
        lambda: class_columns("a cat", ("dog",), model.tokenizer, by_words=False),
    ):
        with pytest.raises(Refused):
            find()


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prompt_fits_where_its_last_token_is_read(family, tmp_path):
    model = load_model(str(tiny_pipelines.save(tmp_path / "model", family)), size=SIZE)
    ((_, places),) = class_columns("cat", ("cat",), model.tokenizer, by_words=False)
    longest = "c" * (512 - places[0])
    assert fit_prompt(longest, model.tokenizer, "prompt") == longest
    with pytest.raises(Refused, match="513 tokens, at most 512 fit"):
        fit_prompt(longest + "c", model.tokenizer, "prompt")


@pytest.mark.parametrize("family", ("sd3", "z-image"))
def test_tokens_are_counted_by_another_tokenizer_than_prompts_are_encoded_with(family, tmp_path):
    """One of transformers keeps the padding of its last call, so `serve` let too long prompts pass, or a batch fail."""
    model = load_model(str(tiny_pipelines.save(tmp_path / "model", family)), size=SIZE)
    model.tokenizers["tokenizer"](["a cat"], padding="max_length", max_length=9, truncation=True)
    assert count_tokens("a cat " * 9, model.tokenizer) > 9
    assert model.tokenizers["tokenizer"].backend_tokenizer.truncation["max_length"] == 9


def test_a_word_that_is_a_piece_of_another_is_read_where_it_stands(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in ("▁a", "▁cup", "board", "s"))]
    tokenizer = tiny_pipelines.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(tiny_pipelines.save(tmp_path / "model", "flux1") / "tokenizer_2")
    tokenizer = load_model(str(tmp_path / "model"), size=SIZE).tokenizer
    assert class_columns("a cupboard a cups", ("cup",), tokenizer, by_words=False) == [("cup", (4, 5))]
    assert token_places("a cupboard a cups", ("cup",), tokenizer, 77) == {"cup": (4, 5)}
    accents = "a cafe\u0301 e\u0301e\u0301 cups"  # each a character of its own
    whole = token_places(unicodedata.normalize("NFC", accents), ("cup",), tokenizer, 77)
    assert token_places(accents, ("cup",), tokenizer, 77) == whole and len(whole["cup"]) == 2
    assert class_columns(accents, ("cup",), tokenizer, by_words=False) == [("cup", whole["cup"])]
    with pytest.raises(Refused, match="no token says 'dog'"):
        concept_places("dog", tokenizer)


def test_a_quoted_word_is_read_at_all_of_its_tokens(tmp_path):
    letters = [letter + ending for letter in "'abefioqstuwx" for ending in ("", "</w>")]
    vocabulary = [*letters, "'s</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = tiny_pipelines.CLIPTokenizer(
        {word: place for place, word in enumerate(vocabulary)}, [("'", "s</w>")], model_max_length=48
    )
    tokenizer.save_pretrained(tiny_pipelines.save(tmp_path / "model", "sd3") / "tokenizer")
    tokenizer = load_model(str(tmp_path / "model"), size=SIZE).tokenizer
    quoted = "a 'sofa' at"  # a, 's as in "sofa's", o, f, a, ' and at
    assert class_columns(quoted, ("sofa",), tokenizer, by_words=False) == [("sofa", (2, 3, 4, 5))]
    assert token_places(quoted, ("sofa",), tokenizer, 77) == {"sofa": (2, 3, 4, 5)}
    assert class_columns("a sofa's box", ("sofa",), tokenizer, by_words=False) == [("sofa", (2, 3, 4, 5))]


def modulations(block, arguments, family):
    """Shift, scale and gate before the attention and before the feed-forward layers, of the image and of the text."""
    if family == "flux2-klein":
        return [arguments[name][:, None].chunk(6, -1) for name in ("temb_mod_img", "temb_mod_txt")]
    if family == "qwen-image":
        return [layer(arguments["temb"])[:, None].chunk(6, -1) for layer in (block.img_mod, block.txt_mod)]
    image, text = (norm.linear(F.silu(arguments["temb"]))[:, None] for norm in (block.norm1, block.norm1_context))
    if getattr(block, "context_pre_only", False):  # of SD3's last block, with the scale first
        text = text.chunk(2, -1)[::-1]
        return [image.chunk(image.shape[-1] // block.norm1.linear.in_features, -1), text]
    return [image.chunk(image.shape[-1] // block.norm1.linear.in_features, -1), text.chunk(6, -1)]


def concepts_of(blocks, seen, concepts, family):
    """ConceptAttention as published (Helbling et al. 2025), block by block and in double precision; `seen` are the
    arguments of each block in a call without concepts, which do not depend on these.
    """
    c, maps = concepts, []
    for number, (block, arguments) in enumerate(zip(blocks, seen, strict=True)):
        attention, is_qwen = block.attn, family == "qwen-image"
        x, p = arguments["hidden_states"], arguments["encoder_hidden_states"]
        image, text = modulations(block, arguments, family)
        norm = block.img_norm1 if is_qwen else getattr(block.norm1, "norm", block.norm1)

        def read(tokens, shift, scale, norm=norm):
            return F.layer_norm(tokens, tokens.shape[-1:], eps=norm.eps) * (1 + scale) + shift

        def heads(layer, head_norm, tokens, attention=attention):
            split = layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            return split if head_norm is None else head_norm(split)

        turns = arguments.get("image_rotary_emb")
        if turns is not None and not is_qwen:  # cosine and sine of each number, text first
            pairs = torch.complex(*(part.double()[:, ::2] for part in turns))
            turns = pairs[-x.shape[1] :], pairs[: -x.shape[1]]
        if turns is not None:
            # FLUX.2's published code has every concept at place 510; a prompt of Qwen-Image begins at 0
            turns = *turns, turns[1][510 if family == "flux2-klein" else 0]

        def turn(tokens, by, turns=turns):
            if turns is None:
                return tokens
            pairs = torch.view_as_complex(tokens.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * turns[by]).flatten(-2)

        def attend(query, key, value, mask=None):
            scores = query @ key.mT / key.shape[-1] ** 0.5
            return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ value

        x_in, p_in, c_in = read(x, *image[:2]), read(p, *text[:2]), read(c, *text[:2])
        own = (attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k), (attention.to_v, None)
        added = (attention.add_q_proj, attention.norm_added_q), (attention.add_k_proj, attention.norm_added_k)
        added += ((attention.add_v_proj, None),)
        q_x, k_x, v_x = (heads(*layer, x_in) for layer in own)
        _, k_p, v_p = (heads(*layer, p_in) for layer in added)
        q_c, k_c, v_c = (heads(*layer, c_in) for layer in added)
        q_x, k_x, k_p, q_c, k_c = turn(q_x, 0), turn(k_x, 0), turn(k_p, 1), turn(q_c, 2), turn(k_c, 2)
        mask = arguments.get("encoder_hidden_states_mask")
        if mask is not None:
            mask = F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]
        o_x = attend(q_x, torch.cat([k_x, k_p], 2), torch.cat([v_x, v_p], 2), mask).transpose(1, 2).flatten(2)
        o_c = attend(q_c, torch.cat([k_x, k_c], 2), torch.cat([v_x, v_c], 2)).transpose(1, 2).flatten(2)
        if number >= len(blocks) // 2:
            maps.append((o_x @ o_c.mT).softmax(-1))
        if len(text) == 2:  # nothing reads its text after the attention
            break
        fed = block.txt_mlp if is_qwen else block.ff_context
        c = c + text[2] * attention.to_add_out(o_c)
        c = c + text[5] * fed(read(c, *text[3:5]))
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("folder", [family for family in FORMS if family != "z-image"], indirect=True)
def test_concepts_are_those_of_the_published_formula(folder):
    place, family, guidance = folder
    model = load_model(str(place), size=SIZE)
    engine, side, cells = TorchEngine(model, device="cpu"), model.levels[0].side, SIZE // model.latents.pixels
    latents = torch.randn(2, model.latents.channels, cells, cells, generator=torch.Generator().manual_seed(0))
    text = call_text(engine, PROMPTS, guidance)
    rows = torch.randn(2, 3, text.context.shape[-1], generator=torch.Generator().manual_seed(1))
    concepts = Text(rows, concepts=3)
    zero = AttentionSums(torch.zeros(2, side**2, 0), torch.zeros(2, side**2, 3))
    output, sums = engine.denoise_and_average(latents, 500.0, text, concepts, zero)
    plain = engine.denoise(latents, 500.0, text)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-6)  # the image does not see them
    network = copy.deepcopy(model.modules["transformer"]).double()
    blocks, seen = list(network.transformer_blocks), []

    def watch(module, arguments, options):
        seen.append(inspect.signature(module.forward).bind(*arguments, **options).arguments)

    with torch.no_grad():
        engine.reference.network, kept = network, engine.reference.network
        hooks = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks]
        engine.reference.predict(latents.double(), 500.0, text.cast(torch.float64))
        for hook in hooks:
            hook.remove()
        engine.reference.network, halves = kept, len(text) // 2
        words = rows.double().repeat(halves, 1, 1)
        words = network.txt_in(network.txt_norm(words)) if family == "qwen-image" else network.context_embedder(words)
        wanted = concepts_of(blocks, seen, words, family)
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

    assert generate.main([*made, "--number", "3", "--out", str(run)]) == 0  # resumed, with the same settings

    asked = [*made, "--ask", "all", "--number", "2"]
    if family == "z-image":
        assert generate.main([*asked, "--out", str(tmp_path / "all")]) == 2
        assert "--ask all: words are read in blocks of two streams" in capsys.readouterr().err
        return
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
