import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rendered import document, write_run

from datasetdm_fast.data import Request
from datasetdm_fast.labels import LABEL_KINDS, pictures
from datasetdm_fast.run_folder import gallery
from datasetdm_fast.run_folder.ledger import Row

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "'\"><svg/onload=alert(1)>",
    "\u2028\u2029&lt;b&gt;",
    "{{samples}} {{run}} {{policy}}",
    "</style><style>*{display:none}</style>",
    "a ball \u202e🎈",
]


class Skeleton(HTMLParser):
    """Every tag with its attributes, as a browser would see them, and the text of the data blocks."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self._block = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(attributes)))
        self._block = dict(attributes).get("id") if tag == "script" else None

    def handle_data(self, text):
        if self._block:
            self.data[self._block] = self.data.get(self._block, "") + text


def page_of(tmp_path, prompts=None, number=8):
    write_run(tmp_path, number, 32, prompts)
    return (tmp_path / "gallery" / "index.html").read_text(encoding="utf-8")


def test_hostile_prompts_change_no_tag_and_come_back_whole(tmp_path):
    benign, hostile = Skeleton(page_of(tmp_path / "a", ["a ball"] * 8)), Skeleton(page_of(tmp_path / "b", HOSTILE))
    assert benign.tags == hostile.tags
    assert [sample["prompt"] for sample in json.loads(hostile.data["samples"])] == HOSTILE


def test_policy_allows_this_page_alone(tmp_path):
    text = page_of(tmp_path / "run", number=1)
    policy = dict(
        next(
            attributes
            for tag, attributes in Skeleton(text).tags
            if tag == "meta" and len(attributes) > 1 and attributes[0][1] == "Content-Security-Policy"
        )
    )["content"]
    assert policy.startswith("default-src 'none'; img-src 'self' file:;") and "unsafe" not in policy
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert "innerHTML" not in text and not re.search(r"\son\w+=", text) and " style=" not in text


def test_every_picture_it_names_is_there(tmp_path):
    page_of(tmp_path, number=3)
    for k in range(3):
        for name in (
            f"images/{k:08d}.png",
            f"semantic/{k:08d}.png",
            f"confidence/{k:08d}.png",
            f"open_vocabulary/{k:08d}.png",
            f"gallery/depth/{k:08d}.png",
        ):
            assert Image.open(tmp_path / name).size == (32, 32)


def test_every_layer_is_drawn_in_a_way_the_page_knows():
    (block,) = re.findall(r"const DRAWINGS = \{\n(.*?)\n\};", gallery.TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)
    layers = [layer for kind in LABEL_KINDS.values() for layer in kind.layers]
    assert {layer.drawing for layer in layers} <= set(re.findall(r"^  (\w+):", block, re.MULTILINE))
    assert len({layer.name for layer in layers}) == len(layers)
    assert all(layer.role in kind.roles for kind in LABEL_KINDS.values() for layer in kind.layers if layer.role)


def test_a_run_without_labels_of_a_kind_has_no_layer_of_it():
    values = document(1) | {"config": document(1)["config"] | {"task": ["depth", "semantic"]}}
    assert [layer.name for layer in gallery._layers(values)] == ["semantic", "confidence", "depth"]


def test_seeds_beyond_javascript_numbers_are_kept():
    row = Row(Request(0, "a ball", 2**63 - 1), {})
    assert gallery._sample(document(1), row)["seed"] == str(2**63 - 1)


def test_depth_pictures_are_bright_where_near():
    picture = np.array(pictures.depth_picture(np.array([[500, 2000], [3000, 4000]], np.uint16)).convert("L"))
    assert picture[0, 0] > picture[0, 1] > picture[1, 0] > picture[1, 1]
    assert pictures.depth_picture(np.full((4, 4), 1000, np.uint16)).size == (4, 4)


@pytest.mark.parametrize("name", ["square", "hole", "two parts", "corner touch", "whole image", "one pixel", "empty"])
def test_borders_enclose_the_mask(name):
    mask = np.zeros((8, 8), bool)
    if name in ("square", "hole"):
        mask[1:7, 2:7] = True
    if name == "hole":
        mask[3:5, 3:5] = False
    if name == "two parts":
        mask[0:2, 0:2] = mask[5:8, 5:8] = True
    if name == "corner touch":
        mask[1:3, 1:3] = mask[3:5, 3:5] = True
    if name == "whole image":
        mask[:] = True
    if name == "one pixel":
        mask[7, 0] = True
    rings = pictures.borders(mask)
    # The shoelace formula gives each ring's area, holes counting against it: together they are the mask's pixels.
    areas = [(x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2 for x, y in (ring.T for ring in rings)]
    assert sum(areas) == mask.sum()
    assert (pictures.outline(mask) == "") == (name == "empty")


def test_simplified_rings_stay_within_the_tolerance():
    y, x = np.mgrid[:64, :64]
    (ring,) = pictures.borders(np.hypot(x - 32, y - 30) < 20)
    few = pictures.simplified(ring, 0.7)
    assert 8 <= len(few) < len(ring) / 3
    assert np.abs(np.hypot(*(few - [32.5, 30.5]).T) - 20).max() < 1.2
