"""Labels from the attention of image to text in one call: Seg4Diff's maps, against a plain transcription."""

import json
import math

import numpy as np
import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F
from tiny_pipelines import SIZE

from datasetdm_fast import Pipeline, audit, generate, label, open_run
from datasetdm_fast.data import AttentionSums
from datasetdm_fast.engine.engines.torch import TorchEngine
from datasetdm_fast.engine.loading import load_model
from datasetdm_fast.engine.loop.call_text import call_text

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


def test_a_run_and_pictures_get_labels_of_the_words_of_their_prompts(folder, tmp_path, capsys):
    place, _, guidance = folder
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

    capsys.readouterr()
    for flags, words in (
        (["--ask", "all"], "does not hold the class word 'house'"),
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
