"""The demo world: truth that agrees with itself, from a seed alone."""

import numpy as np
import pytest

from datasetdm_fast.scenes import world


@pytest.fixture(scope="module")
def views():
    return [world.view(seed, 64) for seed in range(300)]


def test_a_seed_gives_the_same_scene_again(views):
    again = world.view(7, 64)
    assert again.caption == views[7].caption
    for name in ("image", "semantic", "instance", "depth"):
        assert np.array_equal(getattr(again, name), getattr(views[7], name)), name


def test_instances_carry_the_class_of_their_thing(views):
    for view in views:
        for k in np.unique(view.instance):
            classes = set(np.unique(view.semantic[view.instance == k]))
            assert classes <= ({0, 1} if k == 0 else {world.CLASSES.index(view.scene.things[k - 1].kind)})


def test_every_visible_thing_is_named_in_the_caption_from_left_to_right(views):
    for view in views:
        kinds = [word.strip(",") for word in view.caption.split() if word.strip(",") in world.THINGS]
        assert kinds == [thing.kind for thing in view.scene.things]
        assert sorted(thing.x for thing in view.scene.things) == [thing.x for thing in view.scene.things]


def test_all_classes_and_domains_appear_and_rare_ones_rarely(views):
    counts = {kind: sum(thing.kind == kind for view in views for thing in view.scene.things) for kind in world.THINGS}
    assert min(counts.values()) > 0
    rare = {"ring", "star"}
    assert max(counts[kind] for kind in rare) < min(counts[kind] for kind in counts.keys() - rare)
    assert {view.scene.domain for view in views} == set(world.DOMAINS)


def test_nearer_things_hide_farther_ones(views):
    for view in views:
        assert view.depth.min() > 0.4 and view.depth.max() < world.MAX_DEPTH
        wall, things = view.semantic == 0, view.instance > 0
        if wall.any() and things.any():
            assert view.depth[things].max() < view.depth[wall].min()


def test_joints_lie_on_the_figure_where_they_are_visible(views):
    seen = 0
    for view in views:
        for k, points in view.keypoints.items():
            for x, y, visibility in points:
                inside = 0 <= x < 64 and 0 <= y < 64
                assert inside == (visibility > 0)
                if visibility == 2:
                    assert view.instance[int(y), int(x)] == k
                    seen += 1
    assert seen > 200


def test_the_same_scene_at_another_size_has_the_same_labels():
    small, large = world.view(3, 64), world.view(3, 128)
    shrunk = large.semantic[1::2, 1::2]
    assert (shrunk == small.semantic).mean() > 0.97
    for k, points in small.keypoints.items():
        assert np.allclose(points[:, :2] * 2, large.keypoints[k][:, :2])


def test_choices_are_obeyed():
    scene = world.sample_scene(5, count=2, kinds=("star", "ring"), domain="fog")
    assert (
        {thing.kind for thing in scene.things} <= {"star", "ring"} and scene.domain == "fog" and len(scene.things) == 2
    )
    assert scene.caption.endswith(" in fog")


def test_retold_captions_use_only_words_of_the_tokenizer():
    from datasetdm_fast.scenes.tokenizer import WORDS

    rng = np.random.default_rng(0)
    for seed in range(200):
        for word in world.sample_scene(seed).retold(rng).replace(",", " ,").split():
            assert word in WORDS
