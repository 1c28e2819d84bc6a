"""Tables and charts: drawn from a result file, and those of this checkout are the newest file's."""

import copy
import json
import re
import statistics
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest

from bench.machine import measure
from bench.machine.limits import nearest_limit
from bench.machine.machine import ROOT
from bench.report import charts, report, results, tables
from bench.rows import MEASUREMENTS, peers, race
from datasetdm_fast.engine.loop.calls import cached_calls
from datasetdm_fast.errors import GateFailed, Missing, Refused


def times(*rounds):
    return {
        "least": min(rounds),
        "median": sorted(rounds)[len(rounds) // 2],
        "most": max(rounds),
        "rounds": list(rounds),
    }


def peer(name, seconds, **changes):
    row = {
        "peer": name,
        "title": f"title of {name} <&>",
        "status": "ok",
        "dtype": "fp32",
        "batch": 4,
        "load_s": 0.5,
        "first_s": 1.5,
        "peak_mib": 40.0,
    }
    ours = (1.0, 1.0, 1.0)
    row |= {
        "seconds_per_image": times(*seconds),
        "images_per_second": 1 / times(*seconds)["median"],
        "tflops": 0.05,
        "share_of_products": 0.5,
    }
    return row | {"joules_per_image": None, "ours_over": times(*(a / b for a, b in zip(seconds, ours)))} | changes


DOCUMENT = {
    "format": 1,
    "suite": "cpu",
    "date": "2026-01-01T00:00:00Z",
    "command": "python -m bench",
    "machine": {"device": "Some CPU, 2 cores", "commit": "abc1234", "versions": {"torch": "2.13.0"}},
    "setting": {
        "model": "demo",
        "trained": True,
        "tasks": ["depth"],
        "size": 128,
        "calls": 51,
        "tflop_per_image": 0.0583,
        "quick": False,
    },
    "parts": {
        "limits": {"status": "done", "rows": [{"tflops": {"fp32": 0.1, "bf16": 0.2}, "gbps": 20.0, "gexps": 1.0}]},
        "peers": {
            "status": "done",
            "rows": [
                peer("upstream", (4.0, 3.0, 5.0), batch=1),
                peer("torch", (2.0, 2.2, 1.8)),
                {
                    "peer": "upstream-tf32",
                    "title": "the same with TF32",
                    "status": "absent",
                    "why": "a CPU has no such arithmetic",
                },
                peer("ours", (1.0, 1.0, 1.0)),
            ],
        },
        "stages": {
            "status": "done",
            "rows": [{"stage": "encode and write", "status": "ok", "ours_s": times(0.002, 0.003, 0.004)}],
        },
        "layers": {
            "status": "done",
            "rows": [
                {
                    **{
                        "layer": "conv 3x3 8 to 8, 16 cells",
                        "count": 2,
                        "dtype": "fp32",
                        "batch": 4,
                        "layer_s": 0.001,
                        "of_work": 0.6,
                        "bound": "products",
                    },
                    **{"flop_per_byte": 30.0, "tflops": 0.08, "gbps": 3.0, "share": 0.8},
                }
            ],
        },
        "batches": {
            "status": "done",
            "rows": [
                {"peer": name, "dtype": "fp32", "batch": b, "call_s": 0.02 / b, "tflops": 0.05, "peak_mib": 9.0}
                for name in ("diffusers", "ours")
                for b in (1, 2)
            ],
        },
        "profile": {
            "status": "done",
            "rows": [
                {"peer": "ours", "dtype": "fp32", "batch": 4, "call_s": 0.02, "shares": {"attention": 0.3, "idle": 0.7}}
            ],
        },
        "ladder": {"status": "done", "rows": [peer("upstream", (4.0, 3.0, 5.0)), peer("ours", (1.0, 1.0, 1.0))]},
        "scale": {
            "status": "done",
            "rows": [
                {
                    "images": 100,
                    "pixels": 64,
                    "resident_mib": 500.0,
                    "ms": {"engine": 0.1, "own": 0.4, "whole": 2.0},
                },
                {"pixels": 128, "closed": 100, "closing_ms": 0.5, "closing_core_ms": 0.4, "ledger_bytes": 1500},
                {"pixels": 256, "written": 64, "images_per_second": 500.0, "core_ms": 2.0},
                {"commit_ms": 3.0, "rows": 8, "publish_ms": 1.0, "files": 4},
                {"ranks": 1, "images": 32, "images_per_second": 2.0},
                {"ranks": 2, "images": 32, "images_per_second": 3.0},
            ],
        },
    },
}


@pytest.fixture
def document():
    return copy.deepcopy(DOCUMENT)


def test_pages_and_charts_of_this_checkout_are_those_of_the_newest_result_file():
    stale = [
        path.relative_to(ROOT)
        for path, text in report.wanted(ROOT).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run `python -m bench report` and commit what it writes"


def test_ratios_are_medians_of_pairs(document):
    assert peers.ratios(document) == {"fast_vs_torch": 2.0, "fast_vs_upstream": 4.0}
    rows = {row["peer"]: row for row in results.rows_of(document, "peers")}
    assert race.ratio(rows["torch"], rows["upstream"]) == 2.0
    assert report.parity(document) == "pass"


def test_ratios_of_peers_that_raced_one_by_one_come_from_their_own_pairs(document):
    """Ours was twice as slow while it raced torch as while it raced upstream: a busy GPU, or a warm one."""

    def row(peer, seconds, over):
        rounds = {"seconds_per_image": measure.spread([seconds] * 5), "ours_over": measure.spread([over] * 5)}
        return {"peer": peer, "status": "ok", "dtype": "fp32", "batch": 4, **rounds}

    document["parts"] = {
        "peers upstream": {"status": "done", "rows": [row("upstream", 4.0, 4.0), row("ours", 1.0, 1.0)]},
        "peers torch": {"status": "done", "rows": [row("torch", 4.0, 2.0), row("ours", 2.0, 1.0)]},
    }
    assert peers.ratios(document) == {"fast_vs_torch": 2.0, "fast_vs_upstream": 4.0}


def test_a_failed_row_says_so_everywhere(document):
    differs = {"status": "failed", "why": "does not match", "parity": [{"passed": False}]}
    document["parts"]["peers"]["rows"][1] |= differs
    assert report.parity(document) == "fail"
    assert "FAILED: does not match" in report.terminal(document)
    assert "fast_vs_torch" not in peers.ratios(document) and charts.peers(document).count('class="bad">failed') == 1
    red = report.terminal(document, is_coloured=True).splitlines()
    assert [line for line in red if line.startswith(tables.RED)] == [line for line in red if "FAILED: " in line] != []


def test_a_race_that_ended_before_its_first_turn_is_reported_without_times(document):
    """Its peers are prepared, and their rows stored, before any of them is timed."""
    rows = document["parts"]["peers"]["rows"]
    ours = next(row for row in rows if row["peer"] == "ours")
    for name in ("seconds_per_image", "images_per_second", "tflops", "ours_over", "share_of_products"):
        ours.pop(name, None)
    assert ours["title"] in report.terminal(document) and f">{ours['title']}<" not in charts.peers(document)
    assert report.paper({"gpu": document}, "charts") == report.NO_GPU


@pytest.mark.parametrize("name", [name for name, measurement in MEASUREMENTS.items() if measurement.charts])
def test_charts_are_well_formed_and_follow_the_scheme(name, document):
    (drawn,) = report.drawn(document)[name].values()
    root = ET.fromstring(drawn)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert "prefers-color-scheme:dark" in drawn and len(drawn) < 50_000
    for shape in root.iter():
        for axis, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(shape.get(axis, 0)) <= most


def test_every_method_has_a_line_in_the_chart_of_batches(document):
    """However many they are."""
    rows = document["parts"]["batches"]["rows"]
    rows += [{**row, "peer": f"method {k}"} for k in range(9) for row in rows if row["peer"] == "ours"]
    drawn = charts.batches(document)
    assert ">datasetdm_fast<" in drawn and ">ours" not in drawn
    assert all(f">method {k}<" in drawn for k in range(9)) and "s7" in drawn


def test_words_at_the_end_of_lines_do_not_meet():
    assert charts.apart({"a": 50.0, "b": 48.0, "c": 100.0}, 17) == {"b": 48.0, "a": 65.0, "c": 100.0}


def test_names_beside_dots_cover_no_dot_no_other_name_and_no_line():
    dots = {"here": (100.0, 50.0), "near": (125.0, 52.0), "edge": (290.0, 50.0), "mid": (200.0, 100.0)}
    assert charts.beside(dots, [(170.0, 100.0), (230.0, 100.0)], [], 300.0) == {
        "here": (92.0, 54.0, "end"),
        "near": (133.0, 56.0, "start"),
        "edge": (282.0, 54.0, "end"),
        "mid": (200.0, 119.0, "middle"),
    }
    lines = [110.0]  # one that the name below the last dot would cross
    assert charts.beside(dots, [(170.0, 100.0), (230.0, 100.0)], lines, 300.0)["mid"] == (200.0, 91.0, "middle")


def test_a_chart_without_rows_is_not_drawn(document):
    del document["parts"]["ladder"]
    assert "ladder" not in report.drawn(document)


def test_number_and_table_forms():
    assert [tables.number(value) for value in (None, 0.12345, 1234.5, 0.00001, 2)] == [
        "–",
        "0.123",
        "1,230",
        "1e-05",
        "2",
    ]
    for _, _, (head, rows) in report.tables_of(DOCUMENT):
        assert rows and all(len(row) == len(head) for row in rows)
    assert tables.markdown((["a", "b"], [["1", "2"]])) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.fixture
def checkout(tmp_path, document):
    import json

    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "one.json").write_text(json.dumps(document))
    (tmp_path / "README.md").write_text("before\n<!-- bench:summary -->\nold\n<!-- /bench -->\nafter\n")
    (tmp_path / "bench" / "README.md").write_text(
        "".join(f"<!-- bench:{name} -->\n<!-- /bench -->\n" for name in ("cpu", "gpu", "paper"))
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "kernels.md").write_text("<!-- bench:forms -->\n<!-- /bench -->\n")
    return tmp_path


def test_marked_sections_are_written_and_the_rest_is_left(checkout):
    files = report.wanted(checkout)
    front = files[checkout / "README.md"]
    assert front.startswith(
        "before\n<!-- bench:summary -->\n![CPU: peers](bench/charts/cpu-peers.svg)"
    ) and front.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in front and "title of ours" in front and "TF32" not in front
    assert "| attention_capture | plain | fused | plain |" in files[checkout / "docs" / "kernels.md"]
    whole = files[checkout / "bench" / "README.md"]
    assert "No race of ours has been measured on a GPU yet." in whole
    assert "not here: a CPU has no such arithmetic" in whole
    assert "](charts/cpu-peers.svg)" in whole  # as seen from the page's own folder
    assert (checkout / "bench" / "charts" / "cpu-ladder.svg") in files


def test_many_gpus_are_computed_from_the_race_of_one(document):
    gpu = document | {"machine": {"device": "Some GPU"}, "parts": {"peers": {"rows": [peer("ours", (1 / 4.5,) * 3)]}}}
    text = report.paper({"cpu": document, "gpu": gpu}, "charts")
    assert text.startswith("One Some GPU makes 4.5 images per second. ")
    # 4,500 a second at 0.4 + 2.0 * 4 ms of a core, four files each, in batches of 16 that are committed in 3 ms
    assert "| 1,000 | 4,500.0 | 37.80 | 18,000 | 84 % | 12.0 min |" in text  # and closed in 0.5 ms each


def test_the_table_of_a_gpu_says_what_a_cut_run_covers_and_who_raced_before(document):
    clocks = {"power_limit_w": 700, "graphics_most_mhz": 1980}
    machine = {"device": "Some GPU", "commit": "abc1234", "driver": "580.1", "clocks": clocks}
    machine["versions"] = {"torch": "2.11.0", "cuda": "13.0"}
    whole = {"peer": "ours-run", "title": "a whole run", "status": "ok", "images": 96, "batch": 32, "is_left": True}
    whole |= {"images_per_second": 5.0, "watts": 690, "mhz": 1622}
    raced = [peer("ours", (0.25,) * 3), peer("compiled", (1.0,), status="absent", why="no time", is_left=True)]
    parts = {"peers": {"rows": raced}, "peers run": {"rows": [whole]}}
    now = document | {"machine": machine, "parts": parts}
    before = now | {"parts": {"peers": {"rows": [peer("ours", (0.5,) * 3), peer("upstream", (2.0,) * 3)]}}}
    older = before | {"machine": machine | {"commit": "def5678"}}
    older |= {
        "parts": {"peers": {"rows": [peer("ours", (0.5,) * 3), peer("upstream", (3.0,) * 3), peer("x", (4.0,) * 3)]}}
    }
    found = {"gpu": now, "gpu before 0": before, "gpu before 1": older}
    another = {"machine": machine | {"device": "another GPU"}, "parts": {"peers": {"rows": [peer("y", (5.0,) * 3)]}}}
    text = report.gpu_front(found | {"gpu before 2": before | another}, "charts")
    assert "had made 96 images when its time was up, and the last 64 count, at 690 W" in text
    assert [line.split(" | ")[0] for line in text.splitlines()[2:6]] == [
        "| title of x <&>",
        "| title of upstream <&>",
        "| title of ours <&>",
        "| a whole run",
    ]
    assert "Some GPU (700 W and 1980 MHz at most), driver 580.1, CUDA 13.0" in text and "compiled" not in text
    assert text.endswith(" Earlier races with ours: title of upstream <&> (abc1234); title of x <&> (def5678).")


def test_the_bench_page_keeps_the_rows_that_were_changed():
    files = report.wanted(ROOT)
    text = files[ROOT / "bench" / "README.md"]
    now, before = re.findall(r"<!-- bench:(?:earlier-)?claims -->\n(.*?)<!-- /bench -->", text, re.S)
    assert "Instance segmentation, small student, 100 real" in before and "100 real | AP" not in now
    assert before.count("**Does not hold:**") == 4 and "| 73 % |" in now  # semantic: 71.3 to 84.0 mIoU


def test_unsteady_rows_stay_off_the_front_page(document):
    row = next(row for row in document["parts"]["peers"]["rows"] if row["status"] == "ok" and row["peer"] != "ours")
    row |= {"seconds_per_image": measure.spread([1.0, 1.0, 1.2]), "title": "a peer that swings"}
    row |= {"attention": {"others": 0.0}}
    front, whole = report.summary({"cpu": document}, "charts"), report.whole("cpu")({"cpu": document}, "charts")
    assert "swings" not in front and "the rounds differed: 1 row." in front and "UNet calls each |" in front
    assert "| a peer that swings (unsteady: spread 20 %) |" in whole
    assert "swings" not in report.drawn(document)["peers"]["peers"]


def test_a_race_with_an_unsteady_row_is_shown_last_and_marked(document):
    def row(peer, dtype, call, share, mib, **others):
        figures = {"call_s": times(call), "share_of_products": share, "peak_mib": mib, "images_per_second": 1.0}
        title = f"{peer}, one image at a time"
        return {"peer": peer, "title": title, "dtype": dtype, "status": "ok", **figures, **others}

    speedups = {"call_over": times(1.5, 1.4, 1.6), "ours_over": times(1.25, 1.2, 1.3)}
    document["parts"]["peers"]["rows"] = [
        row("ours", "fp32", 2.0, 0.8, 2048),
        row("ours-bf16", "bf16", 1.0, 0.4, 1024),
        row("OpenVINO", "fp32", 3.0, 0.5, 5120, **speedups, seconds_per_image=measure.spread([1.0, 1.0, 1.0])),
        {"peer": "upstream", "status": "absent", "why": "no network"},
    ]
    document["machine"]["device"] = "A(R) Chip Processor @ 2.00GHz, 2 cores"
    swings = copy.deepcopy(document) | {"date": "2026-01-02"}
    swings["parts"]["peers"]["rows"][2] |= {"seconds_per_image": measure.spread([1.0, 1.0, 1.2])}
    swings["parts"]["peers"]["rows"][2] |= {"attention": {"others": 0.0}}
    races = {f"{report.FULL_SIZE} 0": swings, f"{report.FULL_SIZE} 1": document}
    _, _, steady, unsteady, _, sources = report.front(races, "charts").splitlines()
    figures = " | 2 (80 %) | OpenVINO 3 (50 %) | 2.0 : 5.0 GiB | 1.5× (1.4–1.6) | 1.25× (1.2–1.3) |"
    assert (steady, unsteady) == (f"| A Chip 2.00GHz, fp32{figures}", f"| A Chip 2.00GHz, fp32 (unsteady){figures}")
    assert f"{document['date'][:10]} ({document['machine']['commit']}), 2026-01-02 (" in sources


def test_results_of_another_model_have_a_table_of_their_own(document):
    assert results.cpu_suite("demo") == "cpu" and report.FULL_SIZE == "cpu-random-sd14"
    assert "Not measured yet" in report.full_size({"cpu": document}, "charts")
    shown = report.full_size({f"{report.FULL_SIZE} 0": document, f"{report.FULL_SIZE} 1": document}, "charts")
    assert shown.count("| method | precision | s/image |") == 2 and "title of ours" in shown


def test_of_each_machine_the_newest_result_is_shown(document, tmp_path):
    for day, device in ((1, "one"), (2, "other"), (3, "one")):
        own = document | {"date": f"2026-01-0{day}", "machine": document["machine"] | {"device": device}}
        (tmp_path / f"{day}.json").write_text(json.dumps(own), encoding="utf-8")
    assert [path.stem for path in results.newest_of_each_machine("cpu", tmp_path)] == ["3", "2"]


def test_our_own_second_precision_does_not_read_as_a_loss():
    row = {"peer": "ours-bf16", "dtype": "bf16", "ours_over": times(0.5, 0.4, 0.6)}
    assert peers.our_speedup(row) == "2× as fast as in fp32"
    assert peers.our_speedup(row | {"peer": "torch"}).startswith("0.5×") and peers.our_speedup({"peer": "ours"}) == ""


def test_the_front_page_says_in_which_precision_ours_is_faster(document):
    assert "speed-up of datasetdm_fast in fp32, 4 images |" in report.summary({"cpu": document}, "charts")
    for row in document["parts"]["peers"]["rows"]:
        row["dtype"] = "fp16"
    assert "speed-up of datasetdm_fast in fp16, 4 images |" in report.summary({"cpu": document}, "charts")


def test_prose_is_broken_into_lines_and_nothing_else():
    text = f"{'word ' * 40}\n\n| {'cell ' * 40}|\n![{'picture ' * 40}](a.svg)"
    prose, gap, *others = report.wrapped(text).rsplit("\n", 3)
    assert max(map(len, prose.splitlines())) <= report.WIDTH and [gap, *others] == text.split("\n")[1:]


def test_writing_twice_changes_nothing_and_check_tells_what_is_stale(checkout, monkeypatch, capsys):
    monkeypatch.setattr(report, "ROOT", checkout)
    with pytest.raises(GateFailed, match="README.md"):
        report.main(["--check"])
    assert report.main([]) == 0 and "README.md" in capsys.readouterr().out
    assert report.main(["--check"]) == 0 and report.main([]) == 0 and "nothing has changed" in capsys.readouterr().out


def test_an_unknown_section_and_an_empty_folder_are_refused(checkout):
    (checkout / "README.md").write_text("<!-- bench:nonsense -->\n<!-- /bench -->\n")
    with pytest.raises(Refused, match="nonsense"):
        report.wanted(checkout)
    (checkout / "bench" / "results" / "one.json").unlink()
    with pytest.raises(Missing, match="measure first"):
        report.wanted(checkout)


RACES = ("2026-11-29-nvidia-h200-bae85dc", "2026-11-27-nvidia-h200-ff3f316", "2026-11-27-nvidia-h200-db3d26e")


def gpu_rows(race: str) -> list[dict]:
    path = ROOT / "bench" / "results" / f"{race}.json"
    return [row for row in results.rows_of(json.loads(path.read_text()), "peers") if row["status"] == "ok"]


def gpu_row(name: str, races: Sequence[str] = RACES) -> dict:
    """A peer as it raced last."""
    return next(row for race in races for row in gpu_rows(race) if row["peer"] == name)


def bounds(row: dict) -> str:
    over = row["ours_over"]
    return f"{over['least']:.2f} to {over['most']:.2f}"


def forms_by_descriptors() -> dict[str, tuple[float, float]]:
    """Operation -> microseconds as it was launched before, and of the best form by descriptors."""
    text = (ROOT / "bench" / "results" / "2026-11-29-nvidia-h200-1ed3d5e-described.txt").read_text()
    found = re.findall(r"^([\w ]+) described: .*\n.*sum +([\d.]+).*\n.*\n.*sum +([\d.]+)", text, re.MULTILINE)
    return {op: (float(before), float(after)) for op, before, after in found}


def longest(commit: str) -> dict[str, float]:
    """Kernel -> milliseconds in a call of 32 images; those of one name, which is cut, together."""
    path = ROOT / "bench" / "results" / f"2026-11-29-nvidia-h200-{commit}-probe.json"
    rows = results.rows_of(json.loads(path.read_text()), "longest_32")
    taken: Counter[str] = Counter()
    for row in rows:
        taken[row["what"]] += row["ms"]["call"]
    return taken


def reckoned_speeds() -> list[float]:
    """Milliseconds an image in batches of 32 as the sum of its stages: exact, fast25 and cache3."""
    parts = [
        results.rows_of(json.loads((ROOT / "bench" / "results" / f"{name}-probe.json").read_text()), part)
        for name, part in (
            ("2026-11-26-nvidia-h200-f8d9094", "batches"),
            ("2026-11-29-nvidia-h200-1ed3d5e", "speeds"),
        )
    ]
    (stages,) = (row["ms"] for row in parts[0] if row["what"].startswith("batch of 32,"))
    call, others = parts[1][0]["ms"], stages["captured call"] + stages["autoencoder"]
    others += sum(value for name, value in stages.items() if name.startswith("decoder "))
    cached = len(cached_calls(51, (50,)))
    saved = cached * (call["exact"] - call["from deep features"])
    return [others + count * call["exact"] - less for count, less in ((50, 0.0), (24, 0.0), (50, saved))]


def prose_figures() -> Iterator[tuple[str, str]]:
    """A page and a sentence on it, with the figures of the files that they come from."""
    folder = ROOT / "bench" / "results"
    page, name = "docs/benchmarks.md", "2026-11-26-nvidia-h200-7a35297"
    (passed,) = re.findall(r"(283) passed, 1 skipped", (folder / f"{name}-log-1.txt").read_text())
    yield page, f"{passed} GPU tests passed"
    ours, compiled, other, upstream, run = (
        gpu_row(name) for name in ("ours", "diffusers-compiled", "diffusers", "upstream-tf32", "ours-run")
    )
    times = f"{compiled['ours_over']['median']:.2f} times as many"
    yield (
        "docs/gpu.md",
        (
            f"ours {ours['images_per_second']:.2f}, diffusers under `torch.compile` {compiled['images_per_second']:.2f}"
            f", each at 32 images in fp16: {times} ({bounds(compiled)} over three rounds"
        ),
    )
    share = ours["joules_per_image"] / compiled["joules_per_image"]
    yield (
        page,
        f"{times.removesuffix(' as many')} as many images as diffusers under `torch.compile`, at {100 * share:.0f} %",
    )
    yield (
        "docs/gpu.md",
        (
            f"{other['images_per_second']:.2f} beside {gpu_row('ours', RACES[1:])['images_per_second']:.2f} of ours "
            f"({other['ours_over']['median']:.2f} times, {bounds(other)}"
        ),
    )
    yield "docs/gpu.md", f"in TF32, {upstream['images_per_second']:.3f}: {upstream['ours_over']['median']:.1f} times"
    yield "docs/gpu.md", f"{run['images']} images in the 50.3 s in which the GPU worked"
    yield "docs/gpu.md", f"{run['images_per_second']:.2f} a second, {run['joules_per_image']:.0f} J an image"
    yield "docs/gpu.md", f"{run['peak_mib']:,.0f} MiB. At {run['watts']} of 700 W"
    yield "docs/gpu.md", f"took {compiled['first_s']:.0f} s until its first batch"
    forms = forms_by_descriptors()
    before, after = forms["linear_geglu"]
    yield "docs/gpu.md", f"`linear_geglu` {after:.0f} µs instead of {before:.0f}"
    yield "docs/kernels.md", f"`linear_geglu` took {after:.1f} µs instead of {before:.1f}"
    norm = forms["norm_linear gated"][0] - before
    yield "docs/kernels.md", f"`linear_geglu` take {norm + after:.1f} ({norm:.1f} and {after:.1f})"
    before, after = forms["linear_add"]
    yield "docs/gpu.md", f"`linear_add` {after:.0f} instead of {before:.0f}"
    yield "docs/kernels.md", f"`linear_add` {after:.1f} instead of {before:.1f}"
    before, after = forms["norm_linear"]
    yield "docs/kernels.md", f"it took {after:.1f} µs instead of {before:.1f} for queries, keys and values"
    yield "docs/kernels.md", f"before the gate it took {forms['norm_linear gated'][1]:.1f}"
    before, after = forms["linear_activation"]
    yield "docs/kernels.md", f"took {after:,.0f} µs instead of {before:,.0f} for a product of cuBLAS"
    pointers, descriptors = (longest(name) for name in ("1ed3d5e", "bae85dc"))
    before = pointers["_linear_geglu_kernel"] + pointers["_linear_add_kernel"]
    yield "docs/gpu.md", f"both together {descriptors['_described_product_kernel']:.1f} ms instead of {before:.1f}"
    kinds = ("fprop", "sdpa", "described", "nvjet")  # convolutions, attention, products of ours and of cuBLAS
    taken = [sum(value for name, value in descriptors.items() if kind in name) for kind in kinds]
    yield (
        "docs/gpu.md",
        "{:.0f} ms: convolutions {:.1f}, attention {:.1f}, products of ours {:.1f} and of cuBLAS {:.1f}".format(
            sum(descriptors.values()), taken[0] - taken[1], *taken[1:]
        ),
    )
    yield (
        "docs/samplers.md",
        "{:.1f} images per second for `exact`, {:.1f} for `fast25` and {:.1f} for".format(
            *(1000 / milliseconds for milliseconds in reckoned_speeds())
        ),
    )
    yield "docs/samplers.md", f"whole images were timed for `exact` alone, {run['images_per_second']:.2f} per second"
    table = (ROOT / "bench" / "world" / "hard" / "README.md").read_text()
    (first,) = re.findall(r"100 labelled scenes, three students \| ([\d., ]+) \|", table)
    labelled, generated = re.findall(r"labelled by the decoder.* (\S+) \|\n.*generated pictures.* (\S+) \|", table)[0]
    mean = sum(map(float, first.split(", "))) / 3
    yield (
        page,
        f"it reached {generated} mIoU with the images and {labelled} with unlabelled scenes, and three students "
        f"without either {mean:.1f} on average",
    )
    probe = json.loads((folder / "2026-11-26-nvidia-h200-f8d9094-probe.json").read_text())["parts"]
    took = {row["what"]: row["ms"] for part in probe.values() for row in part["rows"]}
    usual, timed = took["convolutions of a batch of 8, fp16, a call and image"].values()
    whole = took["batch of 8, fp16, an image"]
    yield (
        "docs/gpu.md",
        f"take {usual:.2f} ms a call and image, those chosen by timing {timed:.2f}",
    )
    decoders = sum(value for name, value in whole.items() if name.startswith("decoder "))
    yield "docs/gpu.md", f"{decoders:.2f} and {whole['autoencoder']:.2f} ms an image at batch 8"
    level = took["attention of 4096 cells to 4096, 40 wide"]
    yield (
        "docs/kernels.md",
        f"{level['cuDNN']:.2f} ms for the first level of SD 1.4 (16 rows of 8 heads) and ours {level['ours']:.2f}",
    )
    claims = (ROOT / "bench" / "README.md").read_text()  # whose tables are written from their files
    means = re.search(r"\| Domain generalisation \| mIoU \| (.*?) \| .*? \| (.*?) \|", claims)
    varied = re.search(r"\| Domain generalisation, variants of day images \| mIoU \| .*? \| – \| (.*?) \|", claims)
    yield (
        "docs/compositions.md",
        f"give {means[1]} mIoU, with generated images added {means[2]}, with variants of generated day images instead "
        f"{varied[1]} (three",
    )
    costs = re.search(r"one commit of a batch takes (\S+) ms\..* closes the run in (\S+) ms", " ".join(claims.split()))
    yield "docs/scale.md", f"A commit of 8 rows takes {costs[1]} ms"
    yield "docs/scale.md", f"at the end: {float(costs[2]):.2f} ms per sample of one core"
    shards = json.loads((folder / "2026-11-28-intel-r-xeon-r-processor-2-cores-5475ba8-scale.txt").read_text())["rows"][
        0
    ]
    held = shards["bytes_per_sample"]
    yield "docs/scale.md", f"they take {held['index']:.0f} and {held['manifest']} bytes per sample"
    slow = json.loads(
        (folder / "2026-11-22-random-sd14-intel-r-xeon-r-processor-2-50ghz-2-cores-2a83e8b.json").read_text()
    )
    (again,) = (row for row in slow["parts"]["peers diffusers-1"]["rows"] if row["peer"] == "ours")
    yield "bench/README.md", f"beside diffusers, ours took {again['seconds_per_image']['median']:.0f} s per image"
    *epochs, attention = json.loads((folder / "2026-11-29-amd-epyc-2-cores-3a042fc-in-turn.txt").read_text())["rows"]
    ratio = {(row["task"], row["engine"]): row["cpu_epoch_ratio"] for row in epochs}
    for engine, told in (
        ("fast", "an epoch then takes {:.1f} times less CPU time for depth, and {:.1f} times less for semantic"),
        ("torch", "(`--engine torch`) it takes {:.1f} and {:.1f} times less"),
    ):
        yield "docs/training.md", told.format(ratio["depth", engine], ratio["semantic", engine])
    yield "docs/attention.md", f"images with labels take {attention['cpu_ratio']:.1f} times less CPU time"
    yield "docs/attention.md", f"the averages of an image {attention['mib_an_image']} MiB"


def test_tables_of_runs_in_shards_are_those_of_their_files():
    path = ROOT / "bench" / "results" / "2026-11-27-amd-epyc-2-cores-374aa73-scale.txt"
    rows, page = json.loads(path.read_text())["rows"], (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    core = [row["supervisor_core_ms_per_sample"] for row in rows]
    table = {
        "core of the process that supervises, per sample": core,
        "its memory grows by": [row["supervisor_grew_mib"] for row in rows],
        "from the last sample to the end": [row["seconds_from_last_sample_to_end"] for row in rows],
        "`open_run`": [row["reading_seconds"]["open"] for row in rows],
        "a page of the gallery": [row["reading_seconds"]["gallery page"] for row in rows],
        "index and manifest, bytes per sample": [
            row["bytes_per_sample"]["index"] + row["bytes_per_sample"]["manifest"] for row in rows
        ],
    }
    rate, number = gpu_row("ours")["images_per_second"], 40e6
    assert f"the {rate:.2f} images per second of an H200 and the {1000 * core[-1]:.1f} ms" in " ".join(page.split())
    for gpus in (64, 128, 256, 512):  # a shard of 112 samples costs as much as one of 1,000
        table[str(gpus)] = [gpus * rate, number / (gpus * rate) / 3600, 100 * gpus * rate / 112 * core[-1]]
    for title, values in table.items():
        (line,) = re.findall(rf"^\| {re.escape(title)} \| (.*) \|$", page, re.MULTILINE)
        for told, value in zip(re.findall(r"[\d.]+", line.replace(",", "")), values, strict=True):
            assert abs(float(told) - value) <= 0.501 * 10.0 ** -len(told.partition(".")[2]), title


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_stored_figures_are_those_of_their_rounds(path):
    document = json.loads(path.read_text())
    for part in document.get("parts", {}).values():
        timed = {
            row.get("peer"): row["seconds_per_image"] for row in part.get("rows", []) if "seconds_per_image" in row
        }
        for row in part.get("rows", []):
            for name, value in row.items():
                if isinstance(value, dict) and "rounds" in value:
                    rounds = value["rounds"]
                    expected = min(rounds), statistics.median(rounds), max(rounds)
                    assert (value["least"], value["median"], value["most"]) == pytest.approx(expected, rel=2e-4), name
            if row.get("peer") in timed and "images_per_second" in row:
                rate = 1 / row["seconds_per_image"]["median"]
                work = rate * document["setting"]["tflop_per_image"]
                assert row["images_per_second"] == pytest.approx(rate, rel=2e-4, abs=6e-5)
                assert row["tflops"] == pytest.approx(work, rel=1e-3, abs=6e-5)
            if "ours_over" in row and (own := timed.get(row.get("beside", "ours"))):
                pairs = zip(row["seconds_per_image"]["rounds"], own["rounds"], strict=True)
                assert row["ours_over"]["rounds"] == pytest.approx([theirs / ours for theirs, ours in pairs], rel=1e-3)
            if "watts" in row:
                assert row["joules_per_image"] == pytest.approx(row["watts"] / row["images_per_second"], rel=2e-3)


@pytest.mark.parametrize(("page", "sentence"), [*prose_figures()])
def test_figures_in_prose_are_those_of_their_files(page, sentence):
    assert sentence in " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_one_image_is_compared_with_one(document):
    """DatasetDM as written, which makes one image at a time, takes 4 s for it, ours 1 s, and 2 s with one at a time."""
    rows = document["parts"]["peers"]["rows"]
    alone = next(row for row in rows if row["peer"] == "ours")
    rows.append(
        alone | {"peer": "ours-1", "batch": 1, "title": "ours alone", "seconds_per_image": times(2.0, 2.0, 2.0)}
    )
    line = next(
        line for line in report.summary({"cpu": document}, "charts").splitlines() if "title of upstream" in line
    )
    assert line.rstrip(" |").endswith(" | 2×")


@pytest.mark.parametrize(("known", "most"), [({"fp32": 0.1, "bf16": 0.2}, 0.2), ({"fp32": 0.1, "bf16": 0.01}, 0.1)])
def test_a_share_of_peak_is_never_of_an_emulated_type(known, most):
    """A processor without bf16 computes it in fp32, faster than products in bf16 are emulated."""
    limits = {"tflops": known, "gbps": 1.0, "gexps": None}
    assert nearest_limit(most * 1e12, 0, 0, 1.0, limits, "bf16")["share"] == 1.0
    row = {"peer": "ours-bf16", "dtype": "bf16"}
    race.add_times([row], {"ours-bf16": [1.0]}, SimpleNamespace(flops=most * 1e12), limits)
    assert row["share_of_products"] == 1.0
