"""The gallery's page in a browser: opened from the disk, as most people open it."""

import json
import os
import re
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from browser import Watched, browser, until
from PIL import Image
from rendered import document, rendered, write_run

from datasetdm_fast import drop, filter
from datasetdm_fast.data import Request, Sample, SemanticMap, Trust
from datasetdm_fast.engine.labels import number_classes
from datasetdm_fast.engine.labels.class_tables import colour
from datasetdm_fast.runs.gallery import review, server, showing
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.folder import RunFolder

NUMBER = 300
served = server.ServedRun.of_folder


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def run(chromium, tmp_path_factory):
    """More samples than any window shows at once, of sixty pictures."""
    path = tmp_path_factory.mktemp("runs") / "a run"
    samples = [rendered(k, 48) for k in range(60)]
    with RunFolder(path, document(NUMBER, 48)) as folder:
        copies = [
            type(samples[0])(type(s.request)(k, s.request.prompt, k, s.request.classes), s.image, s.annotations)
            for k in range(NUMBER)
            for s in [samples[k % 60]]
        ]
        folder.add(copies, {})
        finish_run(folder)
    return path


def address(path, part=""):
    return f"{(path / 'gallery' / 'index.html').as_uri()}{part}"


def shown(page):
    return page.evaluate("shown.map(sample => sample.id)")


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.dataset.id")


@pytest.mark.parametrize("width, height", [(3840, 2160), (2560, 1440), (1280, 640), (390, 844)])
def test_every_card_of_any_window_is_drawn(chromium, run, width, height):
    watched = Watched(chromium, width, height)
    page = watched.open(address(run))
    for share in (0, 0.5):
        page.evaluate(f"scrollTo(0, document.documentElement.scrollHeight * {share})")
        until(page, "Math.max(...[...cards.values()].map(card => card.getBoundingClientRect().bottom)) >= innerHeight")
        assert page.locator(".card").count() < NUMBER
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_for_selector(f"[data-id='{NUMBER - 1:08d}']")
    assert watched.errors == [] and all(url.startswith(run.as_uri()) for url in watched.asked)
    page.close()


@pytest.mark.parametrize("width, height", [(1280, 640), (390, 844), (844, 390)])
def test_the_opened_picture_and_its_title_are_in_view(chromium, run, width, height):
    page = Watched(chromium, width, height).open(address(run))
    page.click("[data-id='00000001']")
    for selector in ("#frame .stack", "#prompt", "#close"):
        box = page.locator(selector).bounding_box()
        assert box["y"] >= 0 and box["x"] >= 0 and box["x"] + box["width"] <= width, selector
        assert box["y"] + box["height"] <= height, selector
    page.evaluate("by('side').scrollTop = 1e6")
    line = page.locator("#line").bounding_box()
    assert line["y"] + line["height"] <= height
    page.close()


def test_focus_stays_where_it_was(chromium, run):
    page = Watched(chromium).open(address(run))
    page.focus("[data-id='00000001']")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate("viewer.open && opened.id") == "00000002" and focused(page) == "frame"
    ring = page.evaluate(
        "(({borderTopWidth, zIndex}) => [borderTopWidth, zIndex])(getComputedStyle(by('frame'), '::after'))"
    )
    assert ring == ["2px", "2"]  # above the picture, which would cover an outline
    page.focus("#next")
    for _ in range(3):
        page.keyboard.press("Enter")
    assert focused(page) == "next" and page.evaluate("opened.id") == "00000005"
    page.keyboard.press("Escape")
    until(page, "document.activeElement.dataset.id === '00000005'")
    assert not page.evaluate("viewer.open")
    page.keyboard.press("End")
    assert focused(page) == f"{NUMBER - 1:08d}"
    page.close()


def test_escape_leaves_the_search_and_arrows_work_at_once(chromium, run):
    page = Watched(chromium).open(address(run))
    page.keyboard.press("ArrowRight")
    assert focused(page) == "00000000"
    page.keyboard.press("ArrowRight")
    assert focused(page) == "00000001"
    page.keyboard.press("/")
    page.keyboard.type("ball")
    assert focused(page) == "search"
    page.keyboard.press("Escape")
    assert focused(page) == "grid" and page.input_value("#search") == "ball"
    page.keyboard.press("ArrowDown")
    assert focused(page) == shown(page)[0]
    page.close()


def test_a_layer_of_an_address_that_the_run_lacks_is_named(chromium, run):
    page = Watched(chromium).open(address(run, "#layer=semantic,dept"))
    said = page.locator("#summary").inner_text()
    assert "No layer is called dept; there are semantic, confidence, instance" in said
    assert page.evaluate("layersOn") == ["semantic"]
    page.evaluate("location.hash = 'layer=depth'")
    until(page, "layersOn[0] === 'depth'")
    assert "No layer" not in page.locator("#summary").inner_text()
    page.close()


def test_a_sample_of_an_address_that_is_not_among_those_shown_is_named(chromium, run):
    page = Watched(chromium).open(address(run, "#id=00000999"))
    assert page.locator("#summary").inner_text().startswith("No sample 00000999 is among these · ")
    assert not page.evaluate("viewer.open")
    page.evaluate("location.hash = 'id=00000001'")
    until(page, "viewer.open")
    assert "No sample" not in page.locator("#summary").inner_text()
    page.close()


def test_layers_by_key_and_inside_the_viewer(chromium, run):
    page = Watched(chromium).open(address(run))
    before = page.evaluate("layersOn.join()")
    page.keyboard.press("Control+1")
    assert page.evaluate("layersOn.join()") == before == "instance"
    page.keyboard.press("1")
    assert page.evaluate("layersOn.join()") == "instance,semantic"
    page.click("[data-id='00000001']")
    page.locator("#viewer-layers button", has_text="Depth").click()
    assert page.evaluate("layersOn.includes('depth')") and page.locator("#frame [data-layer=depth]").count() == 1
    assert page.locator("#legend .near-to-far").count() == 1 and " m" in page.locator("#legend .scale").inner_text()
    page.close()


def test_two_things_of_a_class_have_two_colours(chromium, run):
    page = Watched(chromium).open(address(run))
    colours = page.evaluate("run.colours.map(colour => Array.from({length: 12}, (_, k) => shade(colour, k)))")
    assert all(len(set(each)) == 12 and each[0].startswith("#") for each in colours)
    twins = page.evaluate(
        "samples.find(sample => new Set(sample.things.map(t => t[0])).size < sample.things.length).id"
    )
    page.goto(address(run, f"#id={twins}&layer=instance"))
    page.reload()
    page.wait_for_selector("#frame .shape")
    fills = page.evaluate("[...document.querySelectorAll('#frame .shape')].map(shape => shape.getAttribute('fill'))")
    assert len(set(fills)) == len(fills) > 1
    page.close()


def test_what_is_sure_stays_clear(chromium, run, tmp_path):
    """The confidence of the rendered labels rises from 0 in the first row to 1 in the last."""
    page = Watched(chromium).open(address(run, "#id=00000001&layer="))
    page.wait_for_selector("#frame .image")
    page.wait_for_timeout(300)
    box = page.locator("#frame .stack").bounding_box()
    pictures = []
    for _ in range(2):
        page.wait_for_timeout(300)
        page.locator("#frame").screenshot(path=tmp_path / "picture.png")
        pictures.append(np.array(Image.open(tmp_path / "picture.png").convert("RGB"), np.int16))
        page.locator("#viewer-layers").get_by_role("button", name="Uncertainty", exact=True).click()
    changed = np.abs(pictures[1] - pictures[0]).mean(2)
    left = int(box["x"] - page.locator("#frame").bounding_box()["x"]) + 5
    top, side = int(box["y"] - page.locator("#frame").bounding_box()["y"]), int(box["width"]) - 10
    rows = changed[top : top + side, left : left + side].mean(1)
    assert rows[-8:].mean() < 4 < 30 < rows[:8].mean()
    page.close()


def test_a_reload_and_a_link_show_the_same(chromium, run):
    page = Watched(chromium).open(address(run))
    page.evaluate("by('filters').classList.add('open')")
    ball = page.locator("#classes button", has_text="ball")
    cone = page.locator("#classes button", has_text="cone")
    ball.click()
    cone.click()
    cone.click()
    page.select_option("#sort", "score")
    page.keyboard.press("5")
    page.fill("#search", "table")
    page.locator("#theme").click()
    found, theme = shown(page), page.evaluate("root.dataset.theme")
    holds = page.evaluate(
        "samples.filter(s => s.shown.includes(run.words.indexOf('ball'))"
        " && !s.shown.includes(run.words.indexOf('cone')) && s.text.includes('table')).length"
    )
    assert 0 < len(found) == holds < NUMBER
    scores = page.evaluate("shown.map(quantities.get('score'))")
    assert scores == sorted(scores)
    page.reload()
    until(page, "filled")
    assert shown(page) == found and page.evaluate("root.dataset.theme") == theme
    assert page.evaluate("layersOn.includes('pose')")
    assert ball.get_attribute("aria-pressed") == "true" and cone.get_attribute("aria-pressed") == "mixed"
    number = page.evaluate("run.shown[run.words.indexOf('ball')]")
    assert ball.get_attribute("aria-label") == f"ball, {number} samples: asked for"
    link = page.url
    page.close()
    other = Watched(chromium).open(link + "&id=" + found[2])
    assert shown(other) == found and other.evaluate("opened.id") == found[2]
    other.close()


def test_limits_and_flags(chromium, run):
    page = Watched(chromium).open(address(run, "#range=2~3~things&range=~5~smallest thing, %&sort=-things"))
    things = page.evaluate(
        "shown.map(sample => [sample.things.length, Math.min(...sample.things.map(t => t[2])) / 10])"
    )
    assert things and all(2 <= count <= 3 and least <= 5 for count, least in things)
    assert [count for count, _ in things] == sorted((count for count, _ in things), reverse=True)
    page.goto(address(run, "#only=missing"))
    page.wait_for_timeout(200)
    assert shown(page) == page.evaluate("samples.filter(s => s.missing.length).map(s => s.id)")
    page.close()


def test_a_page_that_is_told_no_counts_of_classes_counts_its_samples(chromium, tmp_path):
    """As that of a run in shards, whose manifests count instances and no classes of maps."""
    path = tmp_path / "run"
    write_run(path, 5, 48)
    counts = "[...by('classes').children].map(element => [element.dataset.word, element.textContent])"
    page = Watched(chromium).open(address(path))
    whole = page.evaluate(counts)
    script = path / "gallery" / "run.js"
    head, counted, rest = re.split(r'(?<="shown":\[)([^]]*)', script.read_text(), maxsplit=1)
    script.write_text(head + re.sub("[0-9]+", "0", counted) + rest)
    page.reload()
    until(page, "filled")
    assert page.evaluate("run.shown.some(Boolean)") is False
    assert page.evaluate(counts) == whole and len(whole) > 2
    page.click(f"[data-word='{whole[-1][0]}']")
    assert whole[-1][1].endswith(str(page.evaluate("shown.length")))


def test_doubtful_samples_show_that_a_filter_left_out(chromium, tmp_path):
    path, samples = tmp_path / "run", [rendered(k, 48) for k in range(4)]
    samples[2] = replace(samples[2], trust=Trust(reasons=("cube is missing",)))
    with RunFolder(path, document(4, 48)) as folder:
        folder.add(samples, {})
        finish_run(folder)
    assert filter.main([str(path), "--where", "trust == 1", "--quiet"]) == 0
    page = Watched(chromium).open(address(path))
    assert shown(page) == ["00000000", "00000001", "00000003"]
    for button in page.locator("#classes button").all():
        word, told = int(button.get_attribute("data-word")), int(button.locator("small").inner_text())
        assert told == page.evaluate(f"shown.filter(sample => sample.shown.includes({word})).length")
    page.locator("#flags").get_by_text("Doubtful").click()
    assert shown(page) == ["00000002"]
    told = page.locator(".card .doubts").inner_text()
    assert "Left out: trust is 0" in told and "Doubtful: cube is missing" in told
    page.goto(address(path, "#search=00000002"))
    until(page, "shown.length === 0")
    assert "No sample matches, except 1 sample that a filter left out" in page.locator(".nothing").inner_text()
    page.close()


def test_the_page_bears_the_name_of_its_folder_and_its_line_works(chromium, run):
    page = Watched(chromium).open(address(run, "#id=00000007"))
    assert page.title().startswith("a run") and page.locator("#title").inner_text() == "a run"
    assert page.locator("#line").inner_text() == f"python -m datasetdm_fast.generate --out '{run}' --only 00000007"
    page.close()


def test_a_run_folder_whose_name_is_no_utf_8_is_shown_from_the_disk(chromium, tmp_path):
    path = tmp_path / os.fsdecode(b"b\xffd")
    write_run(path, 1, 48)
    page = Watched(chromium).open(f"{path.as_uri()}/gallery/index.html#id=00000000")
    assert page.locator("#title").inner_text() == "b\ufffdd" and page.evaluate("opened.id") == "00000000"
    assert page.locator("#line").inner_text() == "python -m datasetdm_fast.generate --out RUN --only 00000000"
    page.close()


def test_zoom_and_what_lies_under_the_cursor(chromium, run):
    page = Watched(chromium).open(address(run, "#id=00000001&layer=instance"))
    page.wait_for_selector("#frame .shape")
    x, y = page.evaluate(
        "[0, 1].map(k => document.querySelector('#frame .shape').getBoundingClientRect()"
        "[['left', 'top'][k]] + document.querySelector('#frame .shape').getBoundingClientRect()"
        "[['width', 'height'][k]] / 2)"
    )
    page.mouse.move(x, y)
    word = page.evaluate("run.words[opened.things[0][0]]")
    assert word in page.locator("#pointed").inner_text()
    page.mouse.wheel(0, -600)
    page.wait_for_timeout(100)
    assert page.evaluate("zoom.scale") > 1.5 and word in page.locator("#pointed").inner_text()
    page.keyboard.press("0")
    assert page.evaluate("zoom.scale") == 1
    page.close()


PLACES = """selector => {
  const range = document.createRange(), text = document.querySelector(selector).firstChild;
  return [0, text.length - 1].map(at => {
    range.setStart(text, at);
    range.setEnd(text, at + 1);
    return range.getBoundingClientRect().left;
  });
}"""


def test_prompts_run_in_the_direction_of_their_writing(chromium, tmp_path):
    write_run(tmp_path, 2, 48, ["كرة حمراء بجانب cube", "a red ball beside כדור"])
    page = Watched(chromium, 1280, 640).open(address(tmp_path))
    for sample, is_leftwards in (("00000000", True), ("00000001", False)):
        for selector in (f"[data-id='{sample}'] .prompt", "#prompt"):
            if selector == "#prompt":
                page.click(f"[data-id='{sample}']")
            first, last = page.evaluate(PLACES, selector)
            assert (first > last) == is_leftwards, selector
        page.click("#close")
    page.close()


def test_hostile_prompts_leave_the_page_as_it_is(chromium, tmp_path):
    bad = [
        "</script><script>document.title='taken'</script>",
        "<img src=x onerror=document.title='taken'>",
        "');document.title='taken';('",
        "\u2028document.title='taken'//",
        "{{x}} ${document.title='taken'} `",
        "__proto__",
    ]
    write_run(tmp_path, 120, 32, bad * 20)
    watched = Watched(chromium)
    page = watched.open(address(tmp_path, "#id=00000001"))
    assert watched.errors == [] and "taken" not in page.title() and page.evaluate("document.scripts.length") == 4
    assert page.evaluate("samples.map(sample => sample.prompt)") == bad * 20
    assert page.locator("#prompt").inner_text() == bad[1] and page.locator("[onerror]").count() == 0
    page.keyboard.press("Escape")
    page.fill("#search", "__proto__")
    assert shown(page) == [f"{k:08d}" for k in range(5, 120, 6)]
    page.close()


def test_marks_are_kept_and_saved_as_a_list(chromium, run, capsys):
    page = Watched(chromium).open(address(run))
    page.focus("[data-id='00000003']")
    page.keyboard.press("b")
    page.click("[data-id='00000001']")
    for key in ("b", "ArrowRight", "g", "ArrowRight", "b", "b"):
        page.keyboard.press(key)
    page.keyboard.press("Escape")
    until(page, "opened === null")  # so that the address names no sample when it is read again
    page.reload()
    until(page, "filled && marks.size === 3")
    page.evaluate("by('filters').classList.add('open')")
    with page.expect_download() as saved:
        page.click("#save-bad")
    assert saved.value.suggested_filename == "bad.txt" and saved.value.path().read_text() == "00000001\n00000003\n"
    line = shlex.split(page.locator("#dropping").inner_text())
    assert line == ["python", "-m", "datasetdm_fast.drop", str(run), "--file", "bad.txt"]
    assert drop.main([line[3], "--file", str(saved.value.path()), "--dry-run"]) == 0
    assert capsys.readouterr().out.split() == ["00000001", "00000003"]
    page.goto(address(run, "#only=bad"))
    until(page, "shown.length === 2")
    assert shown(page) == ["00000001", "00000003"] and page.locator(".card .mark.bad").count() == 2
    page.close()


@contextmanager
def at_work(*given: Any) -> Iterator[server.RunServer]:
    """A gallery served by a thread of its own within the block; what is given is what `server.open_server` takes."""
    with server.open_server(*given) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield serving
        finally:
            serving.shutdown()
            thread.join()


@pytest.mark.loopback
def test_a_served_page_writes_marks_and_tells_values(chromium, run):
    with at_work(served(run), 18765, print) as serving:
        watched = Watched(chromium)
        page = watched.open(serving.address + "#id=00000001&layer=depth")
        until(page, "served")
        page.keyboard.press("b")
        bad = run / "review" / "bad.txt"
        until(page, "!isSending")
        assert bad.read_text() == "00000001\n"
        assert f"--out '{run.resolve()}'" in page.locator("#line").inner_text()
        dropping = shlex.split(page.evaluate("by('dropping').textContent"))
        assert dropping[3:] == [str(run.resolve()), "--file", str(run.resolve() / "review/bad.txt")]
        box = page.locator("#frame .stack").bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.7)
        until(page, "PIXELS.size > 2 && [...PIXELS.values()].every(Boolean)")
        until(page, "by('pointed').textContent.includes(' m')")  # though the cursor rests
        told = page.locator("#pointed").inner_text()
        x, y = map(int, told.partition(" · ")[0].split(", "))
        view = rendered(1, 48).annotations
        assert f"{view['depth'].metres[y, x]:.2f} m" in told
        assert f"Semantic: {view['semantic'].classes[view['semantic'].labels[y, x]]}" in told
        assert watched.errors == [] and all(url.startswith(serving.address[:22]) for url in watched.asked)
        page.reload()
        until(page, "filled && marks.get('00000001') === 'bad'")
        review.Review(run).change({"00000001": "", "00000002": "good"})  # by somebody else
        page.evaluate("dispatchEvent(new Event('focus'))")
        until(page, "marks.get('00000002') === 'good' && !marks.has('00000001')")
        assert page.locator("[data-mark=bad]").get_attribute("aria-pressed") == "false"
        page.close()


@pytest.mark.loopback
def test_labels_are_corrected_on_a_served_page(chromium, tmp_path):
    """The second instance is deleted, the first renamed, and a region of the picture ignored."""
    write_run(tmp_path / "run", 4, 48)
    run = tmp_path / "run"
    with at_work(served(run), 18765, print) as serving:
        watched = Watched(chromium)
        page = watched.open(serving.address + "#id=00000003&layer=instance")
        until(page, "served && document.querySelectorAll('#correcting select').length > 1")
        count = page.locator("#correcting select").count()
        assert page.locator("#frame .shape").count() == count
        page.locator("#correcting button", has_text="Delete").nth(1).click()
        assert page.locator("#frame .shape").count() == count - 1
        page.locator("#correcting select").first.select_option("ring")
        page.click("#correcting button:has-text('Ignore a region')")
        page.keyboard.press("Escape")  # it ends the marking alone
        assert page.evaluate("viewer.open && !isMarking")
        page.click("#correcting button:has-text('Ignore a region')")
        box = page.locator("#frame .stack").bounding_box()
        unit = box["width"] / 48
        page.mouse.move(box["x"] + 6 * unit, box["y"] + 12 * unit)
        page.mouse.down()
        page.mouse.move(box["x"] + 18 * unit, box["y"] + 24 * unit, steps=3)
        page.mouse.up()
        assert page.evaluate("getSelection().isCollapsed")  # nothing of the page is marked blue by the dragging
        until(page, "!isSending && !uncorrected.size && correctionOf(opened).ignored.length === 1")
        assert page.locator("#frame .unjudged").count() == 1 and watched.errors == []
        expected = {"removed": [["instance", 1]], "renamed": [["instance", 0, "ring"]], "ignored": [[6, 12, 18, 24]]}
        assert json.loads((run / "review/corrections.json").read_text()) == {"00000003": expected}
        page.reload()
        until(page, "filled && served && correctionOf(opened).removed.length === 1")
        page.click("#correcting button:has-text('Ignore a region')")
        page.click("#close")
        until(page, "!viewer.open && !isMarking && opened === null")
        page.evaluate("open(samples.find(each => each.id === '00000003'))")
        for name in ("Restore", "Remove"):
            page.locator("#correcting button", has_text=name).click()
        page.locator("#correcting select").first.select_option(page.evaluate("detailsOf(opened).instance[0][0]"))
        until(page, "!isSending && !uncorrected.size && !correctionOf(opened).renamed.length")
        assert json.loads((run / "review/corrections.json").read_text()) == {}
        page.close()


@pytest.mark.loopback
def test_two_reviewers_correct_one_sample(chromium, tmp_path):
    write_run(tmp_path / "run", 4, 48)
    settled = "!isSending && !uncorrected.size"
    with at_work(served(tmp_path / "run"), 18765, print) as serving:
        first, second = (Watched(chromium).open(serving.address + "#id=00000003") for _ in range(2))
        for page in (first, second):
            until(page, "served && document.querySelectorAll('#correcting select').length > 1")
        first.locator("#correcting button", has_text="Delete").nth(1).click()
        until(first, settled)
        second.locator("#correcting select").first.select_option("ring")
        until(second, settled)
        told = json.loads((tmp_path / "run/review/corrections.json").read_text())["00000003"]
        assert told == {"removed": [["instance", 1]], "renamed": [["instance", 0, "ring"]]}
        second.evaluate("renewMarks()")
        until(second, "correctionOf(opened).removed.length === 1")
        second.locator("#correcting button", has_text="Restore").click()
        until(second, settled)
        told = json.loads((tmp_path / "run/review/corrections.json").read_text())["00000003"]
        assert told == {"renamed": [["instance", 0, "ring"]]}
        first.close(), second.close()


def test_statistics_are_those_of_the_samples_shown(chromium, run):
    page = Watched(chromium).open(address(run, "#search=ball"))
    page.click("#counting")
    found = page.evaluate("statisticsOf(shown, run.figures)")
    things = page.evaluate("shown.flatMap(sample => sample.things)")
    assert sum(each["things"] for each in found["classes"]) == len(things) == sum(found["cells"])
    assert sum(number for _, number in found["areas"]) == len(things)
    assert sum(number for _, number in found["lengths"]) == len(shown(page)) < NUMBER
    assert found["repeated"] == len(shown(page)) - len(set(page.evaluate("shown.map(sample => sample.text)")))
    told = page.locator("#statistics").inner_text()
    assert f"Statistics of {len(shown(page))} of {NUMBER} samples" in told and "Near duplicates are known once" in told
    page.close()


def test_one_sample_is_counted_in_the_singular_and_statistics_name_whole_steps(chromium, tmp_path):
    write_run(tmp_path, 1, 48)
    page = Watched(chromium).open(address(tmp_path))
    assert page.locator("#summary").inner_text().startswith("1 sample ·")
    page.click("#counting")
    assert page.locator("#counted").inner_text() == "Statistics of 1 sample"
    assert "0 prompts repeat an earlier one." in page.locator("#charts").inner_text()
    rows = page.evaluate("[spans([[1, 5], [3, 2]], true), spans([[2, 5], [5, 2]])]")
    names = [[name for name, _ in each] for each in rows]
    assert names == [["1 to 2", "3 to 4"], ["2 to 5", "5 and more"]]
    page.close()


def test_statistics_of_many_classes_have_those_that_most_prompts_name_and_no_prompt_repeats_none(chromium, tmp_path):
    """Of 61 classes that labels show more often, none is named by a prompt; two samples have no prompt."""
    write_run(tmp_path, 3, 48, ["a ball", "", ""])
    page = Watched(chromium).open(address(tmp_path))
    page.evaluate(
        "for (let k = 0; k < 61; k++) { const word = run.words.push(`word ${k}`) - 1; run.colours.push('#000000');"
        " shown[1].shown.push(word); shown[2].shown.push(word); }"
        " for (const sample of shown) { sample.shown = sample.shown.filter(word => run.words[word] !== 'ball');"
        " sample.things = []; }"
    )
    page.click("#counting")
    told = page.locator("#charts").inner_text().splitlines()
    place = told.index("Samples whose prompt names a class")
    assert told[place + 1 : place + 3] == ["ball", "1"]
    assert any(line.startswith("Samples that show a class, the 60 most frequent of") for line in told)
    assert any(line.startswith("0 prompts repeat an earlier one.") for line in told)
    page.close()


def test_a_run_without_classes_has_no_charts_of_them(chromium, tmp_path):
    sample, values = rendered(0, 48), document(1, 48)
    values["labels"] = {"depth": values["labels"]["depth"]}
    values["config"]["task"] = ["depth"]
    with RunFolder(tmp_path, {**values, "classes": []}) as folder:
        folder.add([type(sample)(sample.request, sample.image, {"depth": sample.annotations["depth"]})], {})
        finish_run(folder)
    page = Watched(chromium).open(address(tmp_path))
    page.click("#counting")
    told = page.locator("#charts").inner_text()
    assert "Nearest depth" in told and "show a class" not in told and "of a row" not in told
    page.close()


@pytest.mark.parametrize("width, height", [(390, 844), (320, 640), (844, 390)])
def test_nothing_is_wider_than_a_phone(chromium, run, width, height):
    page = Watched(chromium, width, height).open(address(run))
    page.evaluate("by('filters').classList.add('open')")
    page.locator("#ranges button").click()
    assert page.evaluate("root.scrollWidth <= root.clientWidth")
    assert all(page.locator(f"#{name}").bounding_box()["width"] > 60 for name in ("sort", "search"))
    page.evaluate("open(shown[0])")
    assert page.evaluate("by('side').scrollWidth <= by('side').clientWidth")
    page.close()


def test_the_text_of_a_card_is_cut_off_nowhere_but_at_its_lines(chromium, run, tmp_path):
    """Whether some cards have a line for what is wrong with them, or none."""
    write_run(tmp_path, 8, 48)
    for path in (run, tmp_path):
        page = Watched(chromium).open(address(path))
        assert page.evaluate("[...document.querySelectorAll('.words')].every(e => e.scrollHeight <= e.clientHeight)")
        page.close()


def test_long_names_of_classes_leave_room_for_the_rest(chromium, run):
    page = Watched(chromium, 390, 844).open(address(run))
    page.evaluate("run.words = run.words.map(word => `${word}, which has a name of a good many words and letters`)")
    page.evaluate("by('filters').classList.add('open')")
    page.evaluate("by('classes').replaceChildren(); by('flags').replaceChildren(); filterButtons()")
    assert page.evaluate("root.scrollWidth <= root.clientWidth")
    page.click("#counting")
    assert page.locator(".bars > i").first.bounding_box()["width"] > 100
    page.close()


def test_a_limit_without_bounds_limits_nothing(chromium, run):
    page = Watched(chromium).open(address(run, "#range=~~score"))
    assert len(shown(page)) == NUMBER and page.locator("#filtering").inner_text() == "Filters"
    page.goto(address(run, "#range=1~~things"))
    until(page, "by('filtering').textContent === 'Filters (1)'")
    page.close()


def test_an_empty_page_offers_to_reset_its_filters(chromium, run):
    page = Watched(chromium).open(address(run, "#search=nothing like it"))
    page.locator(".nothing button").click()
    assert len(shown(page)) == NUMBER and focused(page) == "grid" and page.locator(".nothing").count() == 0
    page.close()


def test_a_reset_takes_limits_back_however_often(chromium, run):
    page = Watched(chromium, 1280, 900).open(address(run))
    for _ in range(2):
        page.get_by_text("+ Limit").click()
        page.get_by_placeholder("at least").fill("99")
        page.get_by_placeholder("at least").blur()
        assert shown(page) == []
        page.locator("#flags").get_by_text("Reset").click()
        assert len(shown(page)) == NUMBER and page.get_by_placeholder("at least").count() == 0
    page.close()


@pytest.mark.loopback
def test_a_sample_stays_open_whose_mark_comes_after_it(chromium, run, monkeypatch):
    """The page asks for unmarked samples and opens one before the server has told that it is marked."""

    is_open = threading.Event()

    def late(folder):
        assert is_open.wait(60)
        return {"00000001": "good"}

    monkeypatch.setattr(server.review.Review, "read", late)
    with at_work(served(run), 18785, print) as serving:
        watched = Watched(chromium)
        page = watched.open(serving.address + "#only=unmarked&id=00000001")
        until(page, "opened")
        is_open.set()
        until(page, "served && marks.size === 1")
        assert page.evaluate("opened.id") == "00000001" and "00000001" not in shown(page)
        assert page.locator("[data-mark=good]").get_attribute("aria-pressed") == "true"
        page.keyboard.press("Escape")
        until(page, "!opened")
        assert watched.errors == []
        page.close()


def test_opacity_is_one_value_on_the_page_and_beside_the_opened_sample(chromium, run):
    page = Watched(chromium).open(address(run, "#id=00000001"))
    before = page.evaluate("by('opacity').value")
    page.focus("#viewer-opacity")
    page.keyboard.press("ArrowRight")
    after = page.evaluate("[by('opacity').value, getComputedStyle(root).getPropertyValue('--overlay')]")
    assert float(after[0]) == float(before) + 1 == 100 * float(after[1])
    page.close()


@pytest.mark.loopback
def test_another_run_lies_beside_this_one(chromium, run, tmp_path):
    """The other run has the same pictures, but of sample 2 a darker one."""
    write_run(tmp_path / "other", 4, 48)
    Image.fromarray(rendered(2, 48).image // 2).save(tmp_path / "other/images/00000002.png")
    with at_work(served(run), 18900, print, served(tmp_path / "other")) as serving:
        watched = Watched(chromium)
        page = watched.open(serving.address + "#id=00000002&layer=instance")
        page.click("#beside [data-way=two]")
        until(page, "[...frame.children].every(stack => stack.querySelector('.shape')) && frame.children.length > 1")
        boxes = [page.locator("#frame .stack").nth(k).bounding_box() for k in (0, 1)]
        assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] + 1 and boxes[0]["width"] > 300
        assert page.evaluate("[...frame.children].map(stack => stack.dataset.name)") == [run.name, "other"]
        page.click("#beside [data-way=difference]")
        found = []
        for key in ("ArrowLeft", "ArrowRight"):
            page.keyboard.press(key)
            until(page, "[...document.querySelectorAll('#frame img')].every(image => image.complete)")
            page.wait_for_timeout(300)
            page.locator("#frame .stack").screenshot(path=tmp_path / "difference.png")
            found.append(np.array(Image.open(tmp_path / "difference.png").convert("L")).mean())
        assert found[0] < 4 < 30 < found[1] and watched.errors == []
        page.close()


@pytest.mark.loopback
def test_a_sample_that_the_other_run_has_set_aside_is_shown_beside_this_one(chromium, run, tmp_path):
    with RunFolder(tmp_path / "other", document(2, 48)) as folder:
        folder.add([rendered(0, 48), replace(rendered(1, 48), rejection="it looks odd")], {})
        finish_run(folder)
    with at_work(served(run), 18900, print, served(tmp_path / "other")) as serving:
        page = Watched(chromium).open(serving.address + "#id=00000001&layer=semantic")
        page.click("#beside [data-way=two]")
        until(page, "frame.children.length > 1")
        until(page, "[...frame.querySelectorAll('img')].every(image => image.complete && image.naturalWidth)")
        page.close()


def test_a_sample_of_an_address_that_filters_hide_does_not_open_later(chromium, run):
    page = Watched(chromium).open(address(run, "#id=00000007&search=00000009"))
    assert shown(page) == ["00000009"] and not page.evaluate("viewer.open")
    page.evaluate("by('filters').classList.add('open')")
    page.fill("#search", "0000000")
    assert "00000007" in shown(page) and not page.evaluate("viewer.open")
    page.close()


def many_classes(path, number=110):
    """One sample whose map shows that many classes and, in its first rows, ignored pixels."""
    names, values = tuple(f"class {k}" for k in range(number)), document(1, 48)
    labels = (np.arange(48 * 48) % number).astype(np.uint8).reshape(48, 48)
    labels[:12] = 255
    values["config"]["task"] = ["semantic"]
    values |= number_classes({"semantic": {"classes": list(names), "ignore": 255}})
    label = SemanticMap(labels, np.ones((48, 48), np.float32), names)
    with RunFolder(path, values) as folder:
        folder.add([Sample(Request(0, "", 0, names[-1:]), rendered(0, 48).image, {"semantic": label})], {})
        finish_run(folder)


def test_a_legend_of_many_classes_is_folded(chromium, tmp_path):
    many_classes(tmp_path)
    page = Watched(chromium).open(address(tmp_path, "#id=00000000"))
    legend = page.locator("#legend").inner_text()
    assert legend.startswith("class 0") and "98 more classes" in legend and "class 12" not in legend
    page.locator("#legend summary").click()
    assert "class 12" in page.locator("#legend").inner_text()
    page.keyboard.press("1")  # the legend is made anew, and stays unfolded
    page.keyboard.press("1")
    assert "class 12" in page.locator("#legend").inner_text()
    page.close()


def test_the_legend_tells_shares_of_the_classes_of_a_map_and_while_it_is_shown_of_ignored_pixels(chromium, tmp_path):
    many_classes(tmp_path, 3)
    page = Watched(chromium).open(address(tmp_path, "#id=00000000&layer=semantic"))
    until(page, "by('legend').innerText.includes('ignored')")
    share = "25.0 % of the picture"
    told = f"class 0 {share} class 1 {share} class 2 {share} ignored {share}"
    assert " ".join(page.locator("#legend").inner_text().split()) == told
    dot = page.evaluate("getComputedStyle(by('legend').lastChild.querySelector('.dot')).backgroundColor")
    assert dot == f"rgb{colour(255)}"
    page.keyboard.press("1")
    assert "ignored" not in page.locator("#legend").inner_text()
    page.close()


def test_while_a_map_is_shown_the_legend_tells_what_it_shows_of_a_class_and_not_its_instances(chromium, run):
    page = Watched(chromium).open(address(run, "#id=00000001&layer=semantic"))
    until(page, "by('legend').innerText.includes('of the picture')")
    page.evaluate("opened.things.forEach(thing => { thing[2] = 900; }); tellFacts()")  # as where they overlap
    legend = page.locator("#legend").inner_text()
    assert "× " in legend and sum(map(float, re.findall(r"([\d.]+) % of", legend))) == pytest.approx(100, abs=0.3)
    page.keyboard.press("1")
    assert "180.0 % of the picture" in page.locator("#legend").inner_text()
    page.close()


def test_a_sample_without_a_prompt_says_so_and_its_picture_is_named(chromium, tmp_path):
    many_classes(tmp_path, 3)
    page = Watched(chromium).open(address(tmp_path))
    assert page.locator(".card .prompt").inner_text() == "No prompt"
    page.click(".card")
    assert page.locator("#frame .image").get_attribute("alt") == "Sample 00000000"
    page.close()


def test_the_filters_are_remembered_as_open_only_by_who_opened_them(chromium, run):
    page = Watched(chromium, 1280, 800).open(address(run))
    page.evaluate("localStorage.clear()")
    page.reload()
    until(page, "filled")
    assert page.locator("#filtering").get_attribute("aria-expanded") == "true"
    assert page.evaluate("remembered('filters')") is None
    page.click("#filtering")
    page.reload()
    until(page, "filled")
    assert page.locator("#filtering").get_attribute("aria-expanded") == "false"
    page.close()


def test_the_way_past_the_bars_keeps_what_is_filtered(chromium, run):
    page = Watched(chromium).open(address(run))
    page.fill("#search", "ball")
    found, link = shown(page), page.url
    page.focus(".skip")
    page.keyboard.press("Enter")
    until(page, "document.activeElement === grid")
    assert shown(page) == found != [] and page.url == link
    page.close()


def test_cards_are_items_of_a_list(chromium, run):
    page = Watched(chromium).open(address(run))
    places = "[...grid.querySelectorAll('[role=listitem]')].map(item => [item.ariaPosInSet, item.ariaSetSize])"
    assert page.evaluate(places)[:2] == [["1", str(NUMBER)], ["2", str(NUMBER)]]
    assert page.evaluate("grid.children.length === cards.size")
    page.fill("#search", "ball")
    assert page.evaluate("grid.children.length === cards.size && cards.size > 0")
    page.close()


def test_the_page_of_a_run_in_progress_offers_the_samples_that_were_added(chromium, tmp_path):
    with RunFolder(tmp_path, document(6, 48)) as folder:
        folder.add([rendered(k, 48) for k in range(4)], {})
        showing.write_so_far(tmp_path)
        page = Watched(chromium).open(address(tmp_path, "#search=a&layer=semantic"))
        assert page.locator("#summary").inner_text().startswith("4 samples so far · 6 planned")
        page.evaluate("lookForNews()")
        page.wait_for_timeout(300)
        assert not page.locator("#newer").is_visible()
        before = (tmp_path / "gallery/run.js").read_bytes()
        folder.add([rendered(k, 48) for k in (4, 5)], {})
        showing.write_so_far(tmp_path)
        page.evaluate("lookForNews()")
        until(page, "by('newer').textContent === 'Show 2 more samples'")
        page.click("#newer")
        until(page, "run.samples === 6 && filled")
        assert len(shown(page)) == 6 and page.evaluate("wish.search + layersOn") == "asemantic"
        after = (tmp_path / "gallery/run.js").read_bytes()
        (tmp_path / "gallery/run.js").write_bytes(before)  # as one that is read while the next is written
        other = Watched(chromium).open(address(tmp_path))
        until(other, "by('newer').textContent === 'Read the page again'")
        assert other.locator("#summary").inner_text().startswith("6 samples so far")
        other.close()
        (tmp_path / "gallery/run.js").write_bytes(after)
        finish_run(folder)
    page.evaluate("lookForNews()")
    until(page, "by('newer').textContent === 'Show the finished run'")
    page.click("#newer")
    until(page, "filled && !run.is_in_progress")
    assert page.locator("#summary").inner_text().startswith("6 samples · 48")
    page.close()


def test_a_part_that_cannot_be_read_stays_named(chromium, tmp_path):
    write_run(tmp_path, 2, 48)
    (tmp_path / "gallery/pages/000000.js").unlink()
    page = Watched(chromium).open(address(tmp_path))
    assert page.locator("#summary").inner_text().startswith("pages/000000.js could not be read; audit says more · ")
    page.close()


def test_pictures_that_were_labelled_are_found_by_their_file_names(chromium, tmp_path):
    names = ["a/Street <1>.png", "a/Room.png"]
    with RunFolder(tmp_path, document(2, 48)) as folder:
        folder.add([replace(rendered(k, 48, "a photo"), provenance={"picture": names[k]}) for k in (0, 1)], {})
        finish_run(folder)
    page = Watched(chromium).open(address(tmp_path, "#search=street"))
    assert shown(page) == ["00000000"] and page.locator(".card .told").inner_text() == f"00000000 · {names[0]}"
    page.click(".card")
    assert names[0] in page.locator("#facts").inner_text()
    page.close()
