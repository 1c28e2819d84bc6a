"""The worlds: truth that agrees with itself, from a seed alone."""

import hashlib
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.world.hard import scene as hard
from bench.world.hard.reader import register
from bench.world.hard.render import render
from bench.world.tokenizer import build_tokenizer, words_of
from bench.world.train import SHIPPED, build_models, loosen_caption
from bench.world.worlds import WORLDS
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.engine.scenes.world import joints
from datasetdm_fast.errors import Refused
from datasetdm_fast.training.readers import READERS, RENDERED_KINDS, open_data

COUNTS = {"demo": 300, "hard": 200}


@pytest.fixture
def hard_reader():
    """hard: is an address of labelled images during a test."""
    register()
    yield
    del READERS["hard"]
    RENDERED_KINDS.discard("hard")


@pytest.fixture(scope="module", params=WORLDS)
def rendered(request):
    """A world and its first views."""
    own = WORLDS[request.param]
    return own, [own.view(seed, 64) for seed in range(COUNTS[own.name])]


def test_a_seed_gives_the_same_scene_again(rendered):
    own, views = rendered
    again = own.view(7, 64)
    assert again.caption == views[7].caption
    for name in ("image", "semantic", "instance", "depth"):
        assert np.array_equal(getattr(again, name), getattr(views[7], name)), name


def test_instances_carry_the_class_of_their_thing(rendered):
    own, views = rendered
    for view in views:
        for k in np.unique(view.instance):
            classes = set(np.unique(view.semantic[view.instance == k]))
            assert classes <= ({0, 1} if k == 0 else {own.classes.index(view.scene.things[k - 1].kind)})


def test_every_visible_thing_is_named_in_the_caption_from_left_to_right(rendered):
    own, views = rendered
    for view in views:
        kinds = [word.strip(",") for word in view.caption.split() if word.strip(",") in own.things]
        assert kinds == [thing.kind for thing in view.scene.things]
        assert sorted(thing.x for thing in view.scene.things) == [thing.x for thing in view.scene.things]


def test_all_classes_and_domains_appear_and_rare_ones_rarely(rendered):
    own, views = rendered
    counts = {kind: sum(thing.kind == kind for view in views for thing in view.scene.things) for kind in own.things}
    assert min(counts.values()) > 0
    rare, frequent = {"ring", "star"}, {"ball", "cube", "person", "tree", "cone"}
    assert max(counts[kind] for kind in rare) < min(counts[kind] for kind in frequent)
    assert {view.scene.domain for view in views} == set(own.domains)


def test_nearer_things_hide_farther_ones(rendered):
    own, views = rendered
    for view in views:
        assert view.depth.dtype == np.float32 and view.depth.min() >= 0.2 and view.depth.max() < own.max_depth
        wall, things = view.semantic == 0, view.instance > 0
        if wall.any() and things.any():
            assert view.depth[things].max() < view.depth[wall].min()


def test_joints_lie_on_the_figure_where_they_are_visible(rendered):
    own, views = rendered
    seen = 0
    for view in views:
        assert set(view.keypoints) == {k + 1 for k, thing in enumerate(view.scene.things) if thing.kind == "person"}
        for k, points in view.keypoints.items():
            for x, y, visibility in points:
                inside = 0 <= x < 64 and 0 <= y < 64
                assert inside == (visibility > 0)
                if visibility == 2:
                    assert view.instance[int(y), int(x)] == k
                    seen += 1
    assert seen > 200


def test_the_left_hand_of_a_figure_that_faces_us_is_on_our_right():
    """Arms of 0.33 and legs of 0.4 turn away from straight down; the neck lies at 0.72, the pelvis at 0.42."""
    places = dict(zip(world.JOINTS, joints((0.0, 1.0, -1.0, 0.0, 1.0)).tolist(), strict=True))
    assert places["head"] == pytest.approx([0, 0.87]) and places["neck"] == [0, 0.72] and places["pelvis"] == [0, 0.42]
    for name, start, length, angle, side in (
        ("right_hand", 0.72, 0.33, 2.4, -1),
        ("left_hand", 0.72, 0.33, 0.5, 1),
        ("right_foot", 0.42, 0.4, 0.36, -1),
        ("left_foot", 0.42, 0.4, 0.52, 1),
    ):
        assert places[name] == pytest.approx([side * length * np.sin(angle), start - length * np.cos(angle)]), name


def test_the_same_scene_at_another_size_has_the_same_labels(rendered):
    own, _ = rendered
    for seed in (3, 4, 11):
        small, large = own.view(seed, 64), own.view(seed, 128)
        shrunk = large.semantic[1::2, 1::2]
        assert (shrunk == small.semantic).mean() > 0.96
        for k, points in small.keypoints.items():
            assert np.allclose(points[:, :2] * 2, large.keypoints[k][:, :2])


def test_choices_are_obeyed(rendered):
    own, _ = rendered
    scene = own.sample_scene(5, count=2, kinds=("star", "ring"), domain="fog")
    assert {thing.kind for thing in scene.things} <= {"star", "ring"} and scene.domain == "fog"
    assert len(scene.things) == 2 and scene.caption.endswith(" in fog")


def test_retold_captions_use_only_words_of_the_tokenizer(rendered):
    own, views = rendered
    known, rng = words_of(own), np.random.default_rng(0)
    for view in views:
        for word in loosen_caption(view.scene, rng).replace(",", " ,").split():
            assert word in known


def test_the_tokens_of_the_hard_world_begin_with_those_of_the_demo(tmp_path):
    ours, theirs = (build_tokenizer(tmp_path / name, WORLDS[name]) for name in ("hard", "demo"))
    assert set(theirs.get_vocab()) < set(ours.get_vocab())
    caption = "a red ball and an orange cone on a pink table at night"
    assert ours.tokenize(caption) == theirs.tokenize(caption)
    longest = max((hard.sample_scene(seed, count=8).caption for seed in range(30)), key=len)
    assert len(ours(longest)["input_ids"]) <= 77


def test_the_demo_world_is_the_one_that_taught_the_shipped_weights():
    found, mean = hashlib.sha256(), 0.0
    for seed in range(12):
        view = world.view(seed, 48)
        found.update(view.semantic.tobytes() + view.instance.tobytes() + view.caption.encode())
        mean += float(view.image.mean()) + 10 * float(view.depth.mean())
    assert found.hexdigest() == "234e6a53dbcf79705ac4a345f2c8c57acdcac8e7d5afb5b97b8b3b287ce86452"
    assert mean == pytest.approx(1720.18, abs=0.01)


def test_scenes_have_as_many_things_as_they_may_and_each_can_be_seen(rendered):
    own, views = rendered
    pixels = [np.bincount(view.instance.ravel(), minlength=len(view.scene.things) + 1)[1:] for view in views]
    assert {len(each) for each in pixels} == (set(range(1, 9)) if own.name == "hard" else {1, 2, 3})
    assert (np.concatenate(pixels) >= 12).mean() > 0.97


def test_hard_kinds_differ_within_a_kind():
    """The outlines of two things of a kind, each in its own box, are rarely the same."""
    for kind in hard.THINGS:
        outlines = []
        for seed in range(12):
            view = render(hard.sample_scene(seed, count=1, kinds=(kind,)), 64)
            rows, columns = np.nonzero(view.instance)
            box = view.instance[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] > 0
            across, down = (np.arange(16) * n // 16 for n in (box.shape[1], box.shape[0]))
            outlines.append(box[down][:, across])
        same = [(a & b).sum() / (a | b).sum() for k, a in enumerate(outlines) for b in outlines[:k]]
        assert np.mean(np.array(same) > 0.97) < 0.5, kind


def test_a_hard_scene_costs_a_few_times_a_demo_scene():
    def seconds(own):
        begin = time.process_time()
        for seed in range(20):
            own.view(seed, 64)
        return time.process_time() - begin

    ratio = min(seconds(WORLDS["hard"]) / seconds(WORLDS["demo"]) for _ in range(2))
    assert ratio < 5


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("first, owner", [(1_999_998, "world.judge"), (10_000_005, "the diffusion model")])
def test_seeds_of_the_judges_and_of_the_diffusion_model_are_refused(hard_reader, kind, first, owner):
    with pytest.raises(Refused, match=f"these seeds belong to .*{owner}"):
        open_data(f"{kind}:9@{first}", 64)
    assert len(open_data(f"{kind}:2@{1_999_998}", 64)) == 2


def test_hard_scenes_are_read_as_labelled_images(hard_reader):
    source = open_data("hard:6@40", 64)
    assert source.classes == hard.CLASSES and source.max_depth == hard.MAX_DEPTH
    for item in source:
        assert item.image.shape == (64, 64, 3) and len(item.masks) == len(item.mask_classes)
        for mask, number in zip(item.masks, item.mask_classes):
            assert (item.semantic[mask] == source.classes.index(source.thing_classes[number])).all()


def test_a_model_of_the_hard_world_begins_with_what_the_demo_model_knows(tmp_path):
    from transformers import CLIPTokenizer

    ours = build_tokenizer(tmp_path / "hard", WORLDS["hard"])
    theirs = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    own, old = build_models(ours, SHIPPED), build_models(theirs, SHIPPED)
    texts = [
        text(tokens(["a red ball on a pink table"], padding="max_length", return_tensors="pt").input_ids)
        for tokens, (_, _, text) in ((ours, own), (theirs, old))
    ]
    assert torch.equal(texts[0].last_hidden_state, texts[1].last_hidden_state)
    for ours_part, their_part in zip(own[:2], old[:2]):
        assert all(torch.equal(a, b) for a, b in zip(ours_part.parameters(), their_part.parameters(), strict=True))
    assert own[2].get_input_embeddings().num_embeddings == len(ours) > len(theirs)
    assert own[2].config.eos_token_id == ours.eos_token_id


def test_a_scene_has_one_person_at_most_and_what_lies_beside_it_is_not_drawn():
    scene = world.sample_scene(3, count=4, kinds=("person",))
    assert [thing.kind for thing in scene.things] == ["person"]
    beside = replace(scene, things=(replace(scene.things[0], x=9.0),))
    view = world.render(beside, 32)
    assert not view.instance.any() and not view.keypoints and (view.semantic < 2).all()


def test_every_shape_weather_and_pattern_is_drawn_as_for_the_shipped_weights():
    """Means of the colours, also weighed from left to right, of red over blue, of depths, and a sum of numbers."""
    across = np.linspace(0, 1, 48)[:, None]
    for k, (kind, domain, pattern, light, wanted) in enumerate((
        ("ball", "day", "plain", 0.7, [156.72, 79.23, 60.58, 212.61, 304.0]),
        ("cube", "night", "striped", -0.7, [71.94, 35.0, -14.3, 200.76, 1218.0]),
        ("ring", "fog", "tiled", -0.6, [150.19, 73.01, -2.4, 218.55, 1004.0]),
        ("star", "sunset", "plain", 0.6, [124.79, 61.79, 63.93, 232.56, 871.0]),
        ("tree", "sunset", "tiled", -0.9, [104.55, 52.18, 87.81, 206.9, 253.0]),
        ("person", "sunset", "striped", 0.5, [133.32, 68.65, 88.01, 228.92, 230.0]),
        ("star", "day", "tiled", -0.8, [128.48, 65.82, 32.93, 211.59, 696.0]),
        ("cube", "fog", "plain", 0.9, [158.92, 78.68, 1.54, 219.93, 1787.0]),
        ("ring", "night", "plain", 0.8, [89.08, 44.78, -25.63, 215.06, 339.0]),
        ("ball", "sunset", "striped", -0.5, [121.52, 60.32, 67.66, 205.8, 872.0]),
    )):  # fmt: skip
        scene = world.sample_scene(k, count=1 + k % 4, kinds=(kind,), domain=domain)
        view = world.render(replace(scene, pattern=pattern, light=light), 48)
        image = view.image.astype(float)
        red_over_blue, depth = image[..., 0].mean() - image[..., 2].mean(), 100 * view.depth.mean()
        found = [image.mean(), (image * across).mean(), red_over_blue, depth, view.instance.sum()]
        assert found == pytest.approx(wanted, abs=0.02), kind


def test_joints_are_seen_hidden_or_outside():
    instance = np.zeros((4, 6), np.uint8)[:, :4]
    instance[1:3, 1:] = 2
    points = np.array([[1.5, 1.5, 9], [0.5, 1.5, 9], [3.99, 2.99, 9], [4.0, 2.0, 9], [3, -0.01, 9], [2, 4, 9]])
    world.mark_visible({2: points}, instance)
    assert points[:, 2].tolist() == [2, 1, 2, 0, 0, 0]
