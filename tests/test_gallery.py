import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rendered import document, rendered, write_run

from datasetdm_fast.data import Request, Sample, SemanticMap, Trust
from datasetdm_fast.engine.labels import LABEL_KINDS, number_classes, pictures
from datasetdm_fast.engine.labels.class_tables import colour
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import Missing
from datasetdm_fast.runs.gallery import page, showing
from datasetdm_fast.runs.gallery.page import RunFacts, finish_run, key_of
from datasetdm_fast.runs.run_folder import folder as page_files
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.document import QUARANTINE
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger, Row

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


def page_of(tmp_path, prompts=None, number=8):
    write_run(tmp_path, number, 32, prompts)
    return (tmp_path / "gallery" / "index.html").read_text(encoding="utf-8")


def data(path, kind):
    """What a script hands to the page."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f'receive("{kind}",') and text.endswith(");\n") and text.count("\n") == 1
    return json.loads(text.removesuffix(");\n").split(",", 2)[2])


def test_hostile_prompts_change_no_tag_and_come_back_whole(tmp_path):
    assert page_of(tmp_path / "a", ["a ball"] * 8) == page_of(tmp_path / "b", HOSTILE)
    assert data(tmp_path / "b" / "gallery" / "pages" / "000000.js", "page")["prompt"] == HOSTILE
    for path in (tmp_path / "b" / "gallery").rglob("*.js"):
        if path.name not in page_files.PAGE_FIXED:
            assert not set("<>&\u2028\u2029") & set(path.read_text(encoding="utf-8")), path


def test_policy_allows_only_what_lies_beside_the_page(tmp_path):
    text = page_of(tmp_path / "run", number=1)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    sources = {source for part in policy.split("; ") for source in part.split()[1:]}
    assert sources == {"'none'", "'self'", "file:"}
    script = "".join(page.FIXED_FILES[f"gallery/{name}"].decode() for name in page_files.PAGE_FIXED)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", script) and not re.search(r"<script>|<style>", text)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    assert not re.search(r"\son\w+=", text) and " style=" not in text


def test_pictures_that_an_earlier_version_drew_are_removed(tmp_path):
    write_run(tmp_path, 2, 32)
    (tmp_path / "gallery" / "thumbnails").mkdir()
    (tmp_path / "gallery" / "thumbnails" / "00000000.jpg").touch()
    (tmp_path / "statistics.png").touch()
    (tmp_path / "samples.jsonl").unlink()
    with RunFolder(tmp_path, document(2, 32)) as folder:
        finish_run(folder)
    assert not (tmp_path / "gallery" / "thumbnails").exists() and not (tmp_path / "statistics.png").exists()


def test_sheets_show_every_image_in_its_place_and_are_drawn_once(tmp_path):
    write_run(tmp_path, 63, 32)
    sheet = np.array(Image.open(tmp_path / page_files.SHEET_NAME.format(1)), np.int16)
    assert sheet.shape == (page.ROWS * page.SIDE, page.COLUMNS * page.SIDE, 3)
    for k, top, left in ((50, 0, 0), (52, 0, 2), (59, 0, 9), (60, 1, 0), (62, 1, 2)):
        y, x = top * page.SIDE, left * page.SIDE
        image = np.array(Image.open(tmp_path / f"images/{k:08d}.png"), np.int16)
        assert np.abs(sheet[y : y + 32, x : x + 32] - image).mean() < 12
    assert not sheet[2 * page.SIDE :].any() and not sheet[page.SIDE :, 3 * page.SIDE + 8 :].any()
    before = (tmp_path / page_files.SHEET_NAME.format(0)).stat().st_mtime_ns
    (tmp_path / page_files.SHEET_NAME.format(1)).unlink()
    with RunFolder(tmp_path, document(63, 32)) as folder:
        finish_run(folder)
    assert (tmp_path / page_files.SHEET_NAME.format(0)).stat().st_mtime_ns == before
    assert np.array_equal(np.array(Image.open(tmp_path / page_files.SHEET_NAME.format(1)), np.int16), sheet)
    assert page.thumbnail_sides(512, 256) == (128, 64) and page.thumbnail_sides(1, 9000) == (1, 128)


@pytest.mark.parametrize(("size", "image_format"), [(64, "png"), (192, "png"), (256, "png"), (256, "jpg")])
def test_thumbnails_of_every_size_and_format_show_their_images(tmp_path, size, image_format):
    sheet = tmp_path / page_files.SHEET_NAME.format(0)
    with RunFolder(tmp_path, document(3, size, image_format=image_format)) as folder:
        folder.add([rendered(k, size) for k in range(3)], {})
        finish_run(folder)
        drawn = sheet.read_bytes()
        assert audit(tmp_path).findings == []
        sheet.unlink()
        finish_run(folder)
    assert sheet.read_bytes() == drawn
    image = np.array(Image.open(tmp_path / f"images/00000001.{image_format}").resize((128, 128), Image.Resampling.BOX))
    shown = np.array(Image.open(sheet), np.int16)[:128, 128:256]
    assert size < 128 or np.abs(shown - image).mean() < 4


def test_sheets_of_samples_that_did_not_change_are_not_drawn_again(tmp_path, monkeypatch):
    drawn = []

    def noted(folder, group, draw=page._draw_sheet):
        drawn.append((min(group), len(group)))
        return draw(folder, group)

    made = [rendered(k, 32) for k in range(110)]
    write_run(tmp_path / "whole", 110, 32)
    monkeypatch.setattr(page, "_draw_sheet", noted)
    with RunFolder(tmp_path / "run", document(110, 32)) as folder:
        folder.add(made, {"batch_size": 4})
        finish_run(folder)
        assert sorted(drawn) == [(0, 50), (50, 50), (100, 10)]
        folder.add([replace(made[7], image=made[8].image)], {"batch_size": 4})
        finish_run(folder)
        assert drawn[3:] == [(0, 50)]  # the other sheets still show the same images
        folder.add([made[7]], {"batch_size": 4})
        finish_run(folder)
    whole, run = tmp_path / "whole", tmp_path / "run"
    for name in (*map(page_files.SHEET_NAME.format, range(3)), page_files.SHEETS):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert audit(run).findings == []


def test_pictures_that_are_there_are_not_drawn_again(tmp_path, monkeypatch):
    write_run(tmp_path, 3, 32)
    (tmp_path / "gallery/depth/00000001.png").unlink()
    drawn, draw = [], page._picture_of_sample
    monkeypatch.setattr(
        page,
        "_picture_of_sample",
        lambda path, role, row: drawn.append((role, row.request.id)) or draw(path, role, row),
    )
    with RunFolder(tmp_path, json.loads((tmp_path / "run.json").read_text())) as folder:
        finish_run(folder)
    assert drawn == [("depth", "00000001")]


def test_folders_of_pictures_are_listed_as_often_for_many_pages_as_for_one(tmp_path, monkeypatch):
    listed, counts = [], []

    def note(name, call):
        monkeypatch.setattr(os, name, lambda path=".": listed.append(str(path)) or call(path))

    note("listdir", os.listdir)
    note("scandir", os.scandir)
    for size in (8, 2):
        monkeypatch.setattr(page_files, "PAGE_SAMPLES", size)
        with RunFolder(tmp_path / str(size), document(8, 32)) as folder:
            folder.add([rendered(k, 32) for k in range(8)], {"batch_size": 4})
            finish_run(folder)
        counts.append(sum(path.endswith("gallery/depth") for path in listed))
        listed.clear()
    assert counts[0] == counts[1] > 0


def test_a_sheet_without_one_of_its_images_is_drawn_anew_once_it_is_there(tmp_path):
    write_run(tmp_path, 2, 32)
    image, sheet = tmp_path / "images" / "00000001.png", tmp_path / page_files.SHEET_NAME.format(0)
    kept, shown, known = image.read_bytes(), sheet.read_bytes(), page.read_shown(tmp_path)
    for content in (None, kept):
        image.unlink() if content is None else image.write_bytes(content)
        (tmp_path / page_files.PAGE).unlink()
        if content is None:
            sheet.unlink()
        with RunFolder(tmp_path, document(2, 32)) as folder:
            finish_run(folder)
        assert (sheet.read_bytes() == shown) == (content is not None)
        assert page.read_shown(tmp_path) == (known if content else {"0": page.UNKNOWN})


def test_a_damaged_list_of_sheets_has_them_drawn_again(tmp_path):
    assert page.read_shown(tmp_path) == {}
    (tmp_path / page_files.SHEETS).parent.mkdir(parents=True)
    for content in ('{"0": "ab"}', "{", "[]"):
        (tmp_path / page_files.SHEETS).write_text(content)
        assert page.read_shown(tmp_path) == ({"0": "ab"} if content[-1] == "}" else {})


def test_a_disk_that_fails_ends_the_drawing_of_pictures(tmp_path, monkeypatch):
    write_run(tmp_path, 1, 32)
    with Ledger(tmp_path / "state/ledger.sqlite", read_only=True) as ledger:
        row = ledger.row(0)

    def fail(path, most):
        raise Missing(f"{path}: Input/output error", "Look at the disk.") from OSError(5, "Input/output error")

    monkeypatch.setattr(page.storage, "read", fail)
    with pytest.raises(Missing, match="Input/output error"):
        page._picture_of_sample(tmp_path, "depth", row)
    with pytest.raises(Missing, match="Input/output error"):
        page._draw_sheet(tmp_path, {0: row.files["image"]})


def test_what_a_store_lacks_has_no_picture(tmp_path):
    asked = []
    assert page.fetch_or_draw(asked.append, tmp_path, "gallery/depth/00000001.png") is None
    assert asked == ["depth/00000001.png", f"{QUARANTINE}depth/00000001.png"]
    assert page.fetch_or_draw(Path, tmp_path, "images/00000001.png") == Path("images/00000001.png")


def test_a_run_that_lost_a_map_and_its_picture_is_closed_and_audit_names_the_map(tmp_path):
    write_run(tmp_path, 3, 32)
    lost = [f"{place}depth/00000001.png" for place in ("", "gallery/")]
    for name in lost:
        (tmp_path / name).unlink()
    (tmp_path / "depth/00000002.png").write_bytes(b"no picture")
    (tmp_path / "gallery/depth/00000002.png").unlink()
    (tmp_path / page_files.PAGE).unlink()
    with RunFolder(tmp_path, document(3, 32)) as folder:
        finish_run(folder)
    places = {finding.place for finding in audit(tmp_path).findings}
    assert places == {lost[0], "depth/00000002.png"}


def test_page_index_and_sheets_are_audited(tmp_path):
    write_run(tmp_path, 3, 32)
    names = ["gallery/pages/000000.js", "gallery/details/000000.js", "gallery/sheets/000000.jpg", "gallery/gallery.js"]
    for name in names:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + b" ")
        assert [finding.place for finding in audit(tmp_path).findings] == [name]
        (tmp_path / name).unlink()
        assert [finding.place for finding in audit(tmp_path).findings] == [name]
        with RunFolder(tmp_path, document(3, 32)) as folder:
            finish_run(folder)
        assert (tmp_path / name).read_bytes() == content and audit(tmp_path).findings == []
    (tmp_path / "gallery" / "pages" / "000001.js").write_bytes(b"")
    assert [finding.place for finding in audit(tmp_path).findings] == ["gallery/pages/000001.js"]


def test_classes_are_those_that_labels_show(tmp_path):
    """The prompts name other classes than the pictures hold."""
    write_run(tmp_path, 4, 32, ["a ring"] * 4)
    run, index = data(tmp_path / "gallery/run.js", "run"), data(tmp_path / "gallery/pages/000000.js", "page")
    ring, views = run["words"].index("ring"), [world.view(k, 32) for k in range(4)]
    shown = [{thing.kind for thing in view.scene.things} for view in views]
    assert run["named"][ring] == 4 and run["shown"][ring] == sum("ring" in words for words in shown)
    for k, words in enumerate(shown):
        assert {run["words"][number] for number in index["shown"][k]} - {"wall", "table"} == words
        assert (ring in index["missing"][k]) == ("ring" not in words)
        assert [run["words"][thing[0]] for thing in index["things"][k]] == [
            thing.kind for thing in views[k].scene.things
        ]
    assert run["missing"] == sum("ring" not in words for words in shown)


@pytest.mark.parametrize("palette", ["ours", "voc"])
def test_a_map_tells_its_shares_of_classes_background_and_ignored_pixels_and_their_colours(tmp_path, palette):
    values, labels = document(1, 32), np.ones((32, 32), np.uint8)
    labels[:8], labels[8:12] = 255, 0
    values["config"]["task"] = ["semantic"]
    values |= number_classes({"semantic": {"classes": ["background", "cat", "dog"], "ignore": 255, "palette": palette}})
    label = SemanticMap(labels, np.ones((32, 32), np.float32), ("background", "cat", "dog"))
    with RunFolder(tmp_path, values) as folder:
        folder.add([Sample(Request(0, "a cat", 0, ()), rendered(0, 32).image, {"semantic": label})], {})
        finish_run(folder)
    run, details = data(tmp_path / "gallery/run.js", "run"), data(tmp_path / "gallery/details/000000.js", "details")
    assert details == [[0, {"semantic": [0.125, 0.25, {"1": 0.625}]}]]
    seen = Image.open(tmp_path / "semantic/00000000.png").convert("RGB")
    told = run["layers"][0]["ignored"], run["colours"][run["words"].index("background")]
    assert told == tuple("#{:02x}{:02x}{:02x}".format(*seen.getpixel((0, y))) for y in (0, 8))
    assert [layer["ignored"] for layer in run["layers"][1:]] == [told[0]]


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
    script = page.FIXED_FILES["gallery/gallery.js"].decode()
    (block,) = re.findall(r"const DRAWINGS = \{\n(.*?)\n\};", script, re.DOTALL)
    layers = [layer for kind in LABEL_KINDS.values() for layer in kind.layers]
    assert {layer.drawing for layer in layers} <= set(re.findall(r"^  (\w+):", block, re.MULTILINE))
    assert len({layer.name for layer in layers}) == len(layers)
    assert all(layer.role in kind.roles for kind in LABEL_KINDS.values() for layer in kind.layers if layer.role)


@pytest.mark.parametrize("red, alpha, drawn", [(1, 1, 0), (0, 1, 1), (0.25, 1, 0.75), (0, 0, 0)])
def test_uncertainty_is_drawn_over_the_picture_alone(red, alpha, drawn):
    """A picture that is not square leaves room beside it, which is transparent and black before it is coloured."""
    text = page.FIXED_FILES["gallery/index.html"].decode()
    weights = [float(one) for one in re.search(r'feColorMatrix values="([^"]+)"', text)[1].split()]
    assert sum(w * value for w, value in zip(weights[15:], (red, red, red, alpha, 1), strict=True)) == drawn


def test_a_run_without_labels_of_a_kind_has_no_layer_of_it(tmp_path):
    values = document(1) | {"config": document(1)["config"] | {"task": ["depth", "semantic"]}}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert [layer.name for layer in RunFacts(values, ledger).layers] == ["semantic", "confidence", "depth"]


def test_seeds_beyond_javascript_numbers_are_kept(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        facts = RunFacts(document(1), ledger)
    rows = [Row(Request(0, "a ball", seed), {}) for seed in (2**63 - 1, 7)]
    assert facts.index(rows)["seed"] == [str(2**63 - 1), 7]


@pytest.mark.parametrize("command", [None, "generate", "label", "edit"])
def test_the_page_offers_to_make_a_sample_again_where_generate_made_it(tmp_path, command):
    values = document(1) | ({"command": command} if command else {})
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        offered = RunFacts(values, ledger).whole(is_in_progress=False, has_sheets=False)["command"]
    assert offered == ("" if command in ("label", "edit") else "python -m datasetdm_fast.generate")


def test_a_thing_has_its_score_in_hundredths_and_its_area_and_middle_in_thousandths(tmp_path):
    values = document(1, 32)
    number, word = next(iter(LABEL_KINDS["instance"].names(values["labels"]["instance"]).items()))
    record = [{"category_id": number, "score": 0.29, "area": 128, "bbox": [4.0, 8.0, 8.0, 16.0]}]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        facts = RunFacts(values, ledger)
    (things,) = facts.index([Row(Request(0, "a ball", 7), {}, labels={"instance": record})])["things"]
    assert things == [[facts.number(word), 29, 125, 250, 500]]


def test_a_page_tells_of_each_sample_and_of_all_what_their_rows_say(tmp_path):
    """Worked out by hand: a picture twice as wide as high, labels that were judged, and those of a doubtful one."""
    values = document(2, 32)
    values["config"]["task"] = ["instance"]
    names = LABEL_KINDS["instance"].names(values["labels"]["instance"])
    (number, word), (_, other) = list(names.items())[:2]
    thing = {"category_id": number, "score": 0.5, "area": 512, "bbox": [16.0, 8.0, 32.0, 16.0]}
    trust = Trust(missing=(other,), disagreeing=0.25, reasons=("a", "b"), domain=1.5)
    wide = {"sides": [32, 64], "source": "7", "picture": "p.png"}
    rows = [
        Row(Request(0, "one", 5, (word, other)), wide, labels={"instance": [thing, thing]}, trust=trust),
        Row(
            Request(1, "two", 6, (word,)),
            {},
            {},
            {"instance": []},
            DOUBTFUL,
            "too blue",
            Trust((word,), reasons=("a",)),
        ),
        Row(Request(2, "three", 7), {}, labels={"instance": []}, status=DOUBTFUL, reason="a; b", trust=trust),
    ]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_scores([(0, "sharpness", 0), (1, "sharpness", 2.5), (1, "hash", 3)])
        facts = RunFacts(values, ledger)
        facts.pages.append((0, 3))
    first, second = facts.number(word), facts.number(other)
    index = facts.index(rows)
    figures = [dict(zip(facts.figures, each)) for each in index.pop("figures")]
    assert figures[0] == {"score": 0.5, "disagreeing": 0.25, "domain": 1.5, "sharpness": 0}
    assert (
        figures[1].pop("sharpness") == 2.5 and set(figures[1].values()) <= {None, 0.0} and "hash" not in facts.figures
    )
    assert index == {
        "index": [0, 1, 2],
        "prompt": ["one", "two", "three"],
        "seed": [5, 6, 7],
        "sides": [[32, 64], [32, 32], [32, 32]],
        "named": [[first, second], [first], []],
        "shown": [[first], [], []],
        "missing": [[second], [first], [second]],
        "reasons": [["a", "b"], ["too blue"], ["a", "b"]],
        "aside": [0, 1, 1],
        "picture": ["p.png", "", ""],
        "source": [7, 1, 2],
        "things": [[[first, 50, 250, 500, 500]] * 2, [], []],
    }
    told = facts.whole(has_sheets=True, is_in_progress=False)
    wanted = {"missing": 3, "doubtful": 3, "aside": 2, "samples": 3, "planned": 2}
    assert {name: told[name] for name in wanted} == wanted
    by_word = dict(zip(told["words"], zip(told["named"], told["shown"], strict=True), strict=True))
    assert (by_word[word], by_word[other]) == ((2, 1), (1, 0))


def test_a_thumbnail_is_no_larger_than_its_image_and_keeps_its_sides():
    assert [page.thumbnail_sides(*sides) for sides in ((32, 16), (512, 256), (100, 1000), (1, 4096))] == [
        (32, 16),
        (128, 64),
        (12, 128),
        (1, 128),
    ]


def test_depth_pictures_are_bright_where_near():
    picture = np.array(pictures.depth_picture(np.array([[500, 2000], [3000, 4000]], np.uint16)).convert("L"))
    assert picture[0, 0] > picture[0, 1] > picture[1, 0] > picture[1, 1]
    assert pictures.depth_picture(np.full((4, 4), 1000, np.uint16)).size == (4, 4)
    wide = pictures.depth_picture(np.repeat(np.uint16([[1000, 4000]]), 256, 1))
    assert wide.size == (256, 1) and np.array(wide)[0, [0, 127, 128, 255]].tolist() == [0, 0, 255, 255]
    unknown = np.array(pictures.depth_picture(np.array([[0, 2000], [3000, 4000]], np.uint16)).convert("L"))
    assert unknown[0, 0] == unknown[1, 1] == 0 and unknown[0, 1] > 200
    assert not np.array(pictures.depth_picture(np.zeros((2, 2), np.uint16)).convert("L")).any()
    rows = ([0, 1000, 1001, 1002], [255, 0, 128, 255]), ([1000, 1001], [0, 255])  # millimetres, places in the palette
    assert all(np.array(pictures.depth_picture(np.uint16([row]))).tolist() == [places] for row, places in rows)


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


def test_things_of_a_training_page_are_tinted_within_a_white_outline():
    mask = np.zeros((5, 5), bool)
    mask[1:4, 1:4] = True
    shown = np.array(pictures.paint_masks(np.full((5, 5, 3), 100, np.uint8), mask[None], np.array([2])))
    tint = [int(40 + 0.6 * value) for value in colour(3)]
    assert shown[2, 2].tolist() == tint and (shown[0, 0] == 100).all() and (shown[1:4, 1:4] == 255).all(2).sum() == 8


def test_skeletons_have_the_joints_that_are_seen_and_the_limbs_between_these():
    image, points = np.zeros((20, 20, 3), np.uint8), np.array([[4.0, 4], [14, 4], [4, 14]])
    person = points, np.array([True, True, False])
    shown = np.array(pictures.draw_skeletons(image, [person], ((0, 1), (0, 2))))
    assert shown[4, 4].tolist() == shown[4, 14].tolist() == [255, 60, 60] and not image.any()
    assert (shown[3:6, 9] == (255, 230, 0)).all(1).any() and not shown[8:].any()


@pytest.mark.parametrize("scale", [1, 16])  # large masks are traced in steps
def test_an_outline_is_a_path_of_svg_around_the_mask(scale):
    mask = np.zeros((128, 128), bool)
    mask[20:40, 30:70] = True
    mask = mask.repeat(scale, 0).repeat(scale, 1)
    begin, ways = re.fullmatch(r"M(.+)l(.+)z", pictures.outline(mask)).groups()
    numbers = [float(number) for text in (begin, ways) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    x, y = np.cumsum(np.reshape(numbers, (-1, 2)), axis=0).T
    x, y = x / scale, y / scale
    assert (x.min(), y.min(), x.max(), y.max()) == pytest.approx((30, 20, 70, 40), abs=0.3)
    assert (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2 == pytest.approx(40 * 20, rel=0.02)


def test_simplified_rings_stay_within_the_tolerance():
    y, x = np.mgrid[:64, :64]
    (ring,) = pictures.borders(np.hypot(x - 32, y - 30) < 20)
    few = pictures.simplify(ring, 0.7)
    assert 8 <= len(few) < len(ring) / 3
    assert np.abs(np.hypot(*(few - [32.5, 30.5]).T) - 20).max() < 1.2


def test_the_page_tells_the_file_names_of_pictures_that_were_labelled(tmp_path):
    names = ["a/1 <b>.png", "2.jpg"]
    with RunFolder(tmp_path / "labelled", document(2, 32)) as folder:
        folder.add([replace(rendered(k, 32), provenance={"picture": names[k]}) for k in range(2)], {})
        finish_run(folder)
    write_run(tmp_path / "drawn", 2, 32)
    assert data(tmp_path / "labelled/gallery/pages/000000.js", "page")["picture"] == names
    assert "picture" not in data(tmp_path / "drawn/gallery/pages/000000.js", "page")


def test_a_browser_finds_its_marks_again_once_the_run_has_grown():
    first = document(4)
    more = {"number": 9, "per_class": 3, "keep": 2}
    grown = first | {"config": first["config"] | more, "plan": first["plan"] | {"number": 9}}
    other = first | {"config": first["config"] | {"seed": 7}}
    assert key_of(first) == key_of(grown) != key_of(other)


def test_a_browser_takes_no_marks_of_one_merged_run_for_those_of_another():
    made = [document(4) | {"composition": {"source": {"digests": {"0/samples.jsonl": digest}}}} for digest in "ab"]
    assert len({key_of(each) for each in (document(4), *made)}) == 3


def test_the_page_of_a_run_in_progress_says_so_until_the_run_is_finished(tmp_path):
    with RunFolder(tmp_path, document(3, 32)) as folder:
        folder.add([rendered(0, 32)], {})
        showing.write_so_far(tmp_path)
        told = data(tmp_path / "gallery/run.js", "run")
        assert (told["is_in_progress"], told["samples"], told["planned"]) == (True, 1, 3)
        finish_run(folder)
    assert data(tmp_path / "gallery/run.js", "run") == told | {"is_in_progress": False}
    before = (tmp_path / "gallery/run.js").stat().st_mtime_ns
    showing.write_so_far(tmp_path)  # of a run that has just ended
    assert (tmp_path / "gallery/run.js").stat().st_mtime_ns == before
