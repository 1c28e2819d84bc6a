"""Things named by the attention to the words of a caption, together with what a decoder says."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stub_engine import Tokenizer

from datasetdm_fast.data import ProjectedCapture
from datasetdm_fast.engine.decoders.checkpoint import build_decoder
from datasetdm_fast.engine.decoders.config import DEMO, DecoderConfig, read_config
from datasetdm_fast.engine.labels.class_tables import token_places
from datasetdm_fast.engine.models.capture import Projection
from datasetdm_fast.engine.tasks import TASKS, captions
from datasetdm_fast.errors import Refused
from datasetdm_fast.training import word_heads

pytestmark = pytest.mark.core

CLASSES = ("wall", "ball", "cone")
SIDE = 16  # cells of the highest level of the demo model
HALF = SIDE // 2


@pytest.fixture(scope="module")
def config():
    own = read_config(DEMO / "semantic")
    return replace(own, classes=CLASSES, named=CLASSES[1:], min_area=0)


def answers(batch=1):
    """A ball that the decoder sees on both halves of an image, and the wall; "cone" attends to the right half."""
    logits = torch.tensor([[0.0, 4.0, 3.0, -4.0], [6.0, 0.0, 0.0, -4.0]])
    masks = torch.full((2, SIDE, SIDE), -8.0)
    masks[0, 4:12], masks[1, :4], masks[1, 12:] = 8.0, 8.0, 8.0
    attention = torch.full((77, SIDE, SIDE), 0.01)
    attention[3, :, :HALF], attention[6, :, HALF:] = 0.2, 0.2  # "a red ball and a cone": the start mark is token 0
    raw = {"pred_logits": logits, "pred_masks": masks, "token_attention": attention}
    return {name: value[None].repeat(batch, *[1] * value.ndim) for name, value in raw.items()}


def read(config, prompts, raw=None, task="semantic"):
    raw = raw or answers(len(prompts))
    held = captions.held_to(raw, config, prompts, tokenizer=Tokenizer())
    return TASKS[task].postprocess(held, replace(config, score_threshold=0.1), SIDE)


def test_the_word_that_attends_names_what_the_decoder_sees(config):
    together = read(config, ["a red ball and a cone", "a red ball", "a red thing", "a sphere near it beside a cone"])
    words, one, none, _ = (label.labels for label in together)
    assert (words[5, :HALF] == 1).all() and (words[5, HALF:] == 2).all() and (words[0] == 0).all()
    assert (one[5] == 1).all() and (none[5] == 1).all()  # a single name or none: as the decoder says
    alone = read(config, ["a red ball and a cone"])[0]
    assert (alone.labels == words).all() and (alone.confidence == together[0].confidence).all()


def test_instances_are_named_inside_their_masks(config):
    raw = answers()
    raw["pred_masks"][:, 0, :, :HALF] = -8.0
    (found,) = read(config, ["a red ball and a cone"], raw, "instance")
    assert sorted(found.class_ids) == [0, 2]
    (mask,) = found.masks[found.class_ids == 2]
    assert mask[5, HALF:].all() and not mask[5, :HALF].any()


def test_answers_without_attention_are_read_as_before(config):
    raw = {name: value for name, value in answers().items() if name != "token_attention"}
    (found,) = read(config, ["a red ball and a cone"], raw)
    assert (found.labels[5] == 1).all()


def test_tokens_of_words_are_found_by_what_stands_before_them():
    places = token_places("Two CONES and a cat's ball, balls", ("ball", "cone", "star"), Tokenizer(), 77)
    assert places == {"cone": (2,), "ball": (6, 7)}
    assert token_places("a cone by a ball", ("ball", "cone"), Tokenizer(), 5) == {"cone": (2,)}
    assert token_places("by a dining table and dog", ("dog", "diningtable"), Tokenizer(), 77)["diningtable"] == (3, 4)


def test_attention_to_a_word_is_told_as_a_multiple_of_its_mean(config):
    attention = torch.zeros(2, 77, 2, 2)
    attention[:, 3], attention[:, 6] = torch.tensor([[1.0, 3], [0, 0]]), torch.tensor([[0.0, 0], [4, 4]])
    prompts, names = ["a red ball and a cone", "a red ball"], [{"ball", "cone"}, {"ball"}]
    found = captions.word_attention(attention, config, prompts, names, Tokenizer())
    assert found[0].tolist() == [[[1, 1], [1, 1]], [[1, 3], [0, 0]], [[0, 0], [2, 2]]]
    assert (found[1] == 1).all()  # one name alone is compared with none
    attention[:, 9] = torch.tensor([[0.0, 4], [8, 0]])  # of a second ball, as a mean with that of the first
    twice = captions.word_attention(attention, config, ["a red ball and a cone by a ball"], names[:1], Tokenizer())
    assert twice[0].tolist() == [[[1, 1], [1, 1]], [[0.25, 1.75], [2, 0]], [[0, 0], [2, 2]]]


def test_heads_that_tell_words_are_a_part_of_the_projection(config):
    told = replace(config, word_heads=read_config(DEMO / "semantic").word_heads)
    assert told.word_heads and DecoderConfig.from_json(told.to_json()) == told
    decoder = build_decoder(told).eval()
    maps = [[torch.rand(2, heads, one.side**2, 77) for heads in one.heads] for one in told.levels]
    features = [[torch.rand(2, 2 * width, one.side, one.side) for width in one.features] for one in told.levels]
    raw = SimpleNamespace(features=features, maps=maps, batch=2, side=SIDE)
    sums = []
    for level, own in zip(told.levels, zip(features, maps)):
        weight = Projection(told.levels, {"semantic": decoder})
        place = told.levels.index(level)
        total = sum(
            torch.einsum("bchw,cf->bfhw", half, matrix[k])
            for feature, matrix in zip(own[0], weight.features[place])
            for k, half in enumerate(feature.chunk(2, 1))
        )
        cells = sum(torch.einsum("bhst,htf->bfs", one, part) for one, part in zip(own[1], weight.maps[place]))
        sums.append(total + cells.unflatten(2, (level.side, level.side)))
    with torch.inference_mode():
        expected, found = decoder.token_attention(raw), decoder(ProjectedCapture(tuple(sums), {}))
    torch.testing.assert_close(found["token_attention"], expected)
    assert expected.shape == (2, 77, SIDE, SIDE)
    with torch.inference_mode():
        plain = build_decoder(replace(told, word_heads=()))
        plain.load_state_dict(decoder.state_dict())
        own = ProjectedCapture(tuple(total[:, : told.width] for total in sums), {})
        torch.testing.assert_close(plain.eval()(own)["pred_masks"], found["pred_masks"])


@pytest.mark.parametrize("heads", [[1.0], [0.0] * 30, [-1.0] + [1.0] * 29])
def test_heads_that_do_not_fit_are_refused(config, heads):
    with pytest.raises(Refused, match="word_heads"):
        DecoderConfig.from_json(json.dumps(json.loads(config.to_json()) | {"word_heads": heads}))


class OneHeadViews:
    """Images of two things, whose words attend in head 13 alone."""

    def __init__(self, config, is_told=True, images=15):
        self.config, self.is_told, self.images = config, is_told, images
        self.captures = SimpleNamespace(batch=self.batch, layout=SimpleNamespace(features=(0,) * 4))

    def first_views(self, most_images):
        assert most_images == 400
        return range(self.images)

    def item(self, view):
        return SimpleNamespace(caption="a ball beside a cone" if view % 2 else "a cone beside a ball")

    def batch(self, views):
        levels = []
        for level in self.config.levels:
            generator = torch.Generator().manual_seed(views[0])
            maps = torch.rand(level.side**2, sum(level.heads), 77, generator=generator) * 0.1
            if level.name == "high" and self.is_told:
                rows = maps[:, 1].unflatten(0, (level.side, level.side))
                rows[:, : level.side // 2, 2] += 1  # the first word is on the left
                rows[:, level.side // 2 :, 5] += 1
            levels.append(maps.flatten(1)[None])
        return levels

    def target(self, view):
        masks = torch.zeros(2, 32, 32, dtype=torch.bool)
        masks[0, :, :16], masks[1, :, 16:] = True, True
        return SimpleNamespace(classes=torch.tensor([1, 2] if view % 2 else [2, 1]), masks=masks)


def test_a_training_learns_which_head_tells_words(config):
    heads = word_heads.learn_heads(OneHeadViews(config), config, Tokenizer())
    assert heads.right == 1 and heads.masks == 30 and max(heads.shares) == heads.shares[13] > 0.5
    assert heads.add_to(config).word_heads == heads.shares and not any(heads.shares[:12])
    nothing = word_heads.learn_heads(OneHeadViews(config, is_told=False), config, Tokenizer())
    assert nothing.shares == () and nothing.add_to(config) is config
    assert (
        word_heads.learn_heads(OneHeadViews(config), replace(config, named=()), Tokenizer()) == word_heads.WordHeads()
    )


@pytest.mark.parametrize(("right", "wrong", "told"), [(15, 5, 0.75), (14, 5, 0.7368), (20, 1, 0.9524)])
def test_heads_are_read_where_three_masks_of_four_are_named_rightly(config, monkeypatch, right, wrong, told):
    count = sum(sum(level.heads) for level in config.levels)
    inside = torch.full((count, 2), 0.1)
    inside[-1, 0] = 0.4
    names = [0] * right + [1] * wrong
    masks = [word_heads.NamedMask(inside, torch.full((count, 2), 0.1), name) for name in names]
    monkeypatch.setattr(word_heads, "_masks", lambda *_: [*masks, *masks])
    heads = word_heads.learn_heads(OneHeadViews(config), config, Tokenizer())
    assert heads.masks == 2 * (right + wrong) and bool(heads.shares) == (told >= 0.75)
    assert heads.right == pytest.approx(told, abs=0 if heads.shares else 1e-4)


def test_images_that_name_one_class_teach_no_heads(config, monkeypatch):
    monkeypatch.setattr(OneHeadViews, "item", lambda self, view: SimpleNamespace(caption="a ball beside a ball"))
    assert word_heads.learn_heads(OneHeadViews(config), config, Tokenizer()) == word_heads.WordHeads()


def test_the_heads_of_few_masks_or_of_words_that_are_often_confused_are_not_read(config):
    many, few = (word_heads.learn_heads(OneHeadViews(config, images=count), config, Tokenizer()) for count in (10, 9))
    assert (many.masks, few.masks, few.shares, few.right) == (20, 18, (), 0.0) and many.shares
    inside, overall = torch.full((2, 2), 0.1), torch.full((2, 2), 0.1)
    inside[1] = torch.tensor([0.4, 0.1])  # the second head finds the first class
    masks = [word_heads.NamedMask(inside, overall, name) for name in (0, 0, 0, 1)]
    share = np.linspace(0.1, 0.2, 1001)  # of the second head, by which the first class is so many times as likely
    times = ((0.1 + 0.3 * share) / 0.1) ** 3
    loss = -(3 * np.log(times / (times + 1)) - np.log(times + 1)) / 4 - 0.003 * np.log(share * (1 - share)) / 2
    padded = word_heads._pad(masks)
    assert float(word_heads._fit_shares(*padded, torch.tensor([0, 0, 0, 1]))[1]) == pytest.approx(
        share[loss.argmin()], abs=2e-4
    )
    told = word_heads._log_ratios(*padded, torch.tensor([0.25, 0.75]))
    assert told[0].tolist() == pytest.approx([math.log(0.325 / 0.1), 0.0], abs=1e-6)
    one = word_heads.NamedMask(torch.ones(2, 1), torch.ones(2, 1) * 0.5, 0)
    padded = word_heads._pad([masks[0], one])
    assert padded[0][1].tolist() == [[1, 0], [1, 0]] and padded[1][1].tolist() == [[0.5, 1], [0.5, 1]]
    heads = torch.tensor([sum(level.heads) for level in config.levels])
    kept = torch.cat(
        [torch.full((count,), share / count) for count, share in zip(heads.tolist(), (0.1, 0.19, 0.21, 0.5))]
    )
    shares = word_heads._drop_idle_levels(kept, config).split(heads.tolist())
    assert [float(part.sum()) for part in shares] == pytest.approx([0, 0, 0.21 / 0.71, 0.5 / 0.71])
