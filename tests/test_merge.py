"""merge: every sample once, its files byte for byte, whole for audit, and split by what it was made of."""

import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rendered import document, rendered, write_run

from datasetdm_fast import audit as audit_command
from datasetdm_fast import convert, drop, edit, filter, open_run, split
from datasetdm_fast.data import Quarantined, Trust
from datasetdm_fast.disk.storage import StoredFile, sha256_of
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.merge import main
from datasetdm_fast.runs.compositions.composition import Source, SquareSource
from datasetdm_fast.runs.compositions.merging import ShardMerging, _join_models, _merge, _merge_decoders
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.folder import RunFolder, unseal
from datasetdm_fast.runs.run_folder.selections import groups, origins
from datasetdm_fast.runs.run_folder.shard_places import shard_place
from datasetdm_fast.runs.run_folder.shards import ShardEntry


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that have two pictures in common, and one whose samples vary those of the first."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "first", 6, 32)
    with RunFolder(root / "second", document(5, 32)) as folder:
        trust = Trust(domain=1.5, reasons=("the picture is unlike those",))  # as only the decoders could tell
        folder.add([replace(moved(k, k + 4), trust=trust) for k in range(5)], {})
        finish_run(folder)
    first = list(open_run(root / "first"))
    with RunFolder(root / "varied", document(3, 32)) as folder:
        for k in range(3):
            folder.add(
                [moved(k, k + 50)], {"source": first[k].id, "group": first[k].row.files["image"].stored.sha256[:16]}
            )
        finish_run(folder)
    return root


def moved(index: int, like: int):
    """A sample with the picture of another."""
    sample = rendered(like, 32)
    return replace(sample, request=replace(sample.request, index=index, seed=index))


def test_a_merged_run_has_every_sample_once_byte_for_byte(runs, tmp_path, capsys):
    out = tmp_path / "all"
    line = [*(str(runs / name) for name in ("first", "second", "varied")), "--out", str(out), "--json"]
    assert main(line) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["number"], told["made"], told["duplicates"]) == (12, 12, 2)
    assert audit(out).findings == []
    assert main([*line, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["number"], planned["done"], planned["duplicates"]) == (12, 12, 2)
    found = open_run(out)
    assert len(found) == 6 + 5 - 2 + 3 and found.is_complete
    digests = [sha256_of(runs / name / "samples.jsonl")[:16] for name in ("first", "second", "varied")]
    keys = [f"{digests[0]}/{k:08d}" for k in range(6)] + [f"{digests[1]}/{k:08d}" for k in (2, 3, 4)]
    own = keys + [f"{digests[2]}/{k:08d}" for k in range(3)]
    assert [sample.meta["origins"][-1] for sample in found] == own  # as a composition of a run names its sources
    for sample in found:
        told = sample.meta["merged"]
        source = open_run(runs / told["run"])[told["id"]]
        assert source.prompt == sample.prompt and (source.image == sample.image).all()
        assert source.trust == sample.trust and (told["run"] == "second") == (sample.trust.domain == 1.5)
        for role, (name, stored) in sample.row.files.items():
            path, written = source.row.files[role]
            assert stored == written and (out / name).samefile(runs / told["run"] / path)
        assert (source.instances.masks == sample.instances.masks).all()
        assert (source.semantic.labels == sample.semantic.labels).all()
    lines = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    assert [line["merged"] for line in lines] == [sample.meta["merged"] for sample in found]
    together = groups([origins(found.document, sample.row) for sample in found])
    assert together[:3] == together[-3:] and len(set(together)) == len(found) - 3


def test_a_splice_of_an_earlier_version_belongs_to_the_variants_of_its_pictures(runs, tmp_path):
    """`splice` put samples of a run side by side, and named them as `tiles`, their groups as `groups`."""
    first, out = list(open_run(runs / "first")), tmp_path / "all"
    pairs = [(k, (k + 1) % 6) for k in range(6)]
    with RunFolder(tmp_path / "spliced", document(6, 32) | {"command": "splice"}) as folder:
        for k, pair in enumerate(pairs):
            names = sorted({name for tile in pair for name in origins(document(6, 32), first[tile].row)})
            folder.add([moved(k, k + 70)], {"tiles": [first[tile].id for tile in pair], "groups": names})
        finish_run(folder)
    assert main([str(tmp_path / "spliced"), str(runs / "varied"), "--out", str(out), "--quiet"]) == 0
    found = open_run(out)
    rows = list(found.rows())
    numbers = groups([origins(found.document, row) for row in rows])
    for variant, number in zip(rows[6:], numbers[6:], strict=True):
        shown = [k for k, row in enumerate(rows[:6]) if variant.recipe["source"] in row.recipe["tiles"]]
        assert shown and {numbers[k] for k in shown} == {number}


def test_the_words_of_a_class_table_go_on_meaning_what_they_meant(runs, tmp_path):
    own = class_tables.parse("name,words\ntree,\n,toy tree\n")
    table = {"class_table": class_tables.rows_of(own, ("tree",), has_colours=False)}
    trees = [k for k in range(200) if {"tree", "ball"} <= {*rendered(k, 32).request.classes}]
    plan = document(2, 32)["plan"]
    for name, like, searched in (("one", trees[:2], ["tree", "ball"]), ("other", trees[2:4], ["ball", "cube"])):
        described = document(2, 32) | table | {"plan": plan | {"words": searched}}
        with RunFolder(tmp_path / name, described) as folder:
            samples = [moved(k, number) for k, number in enumerate(like)]
            said = [replace(each.request, prompt="a ball and a toy tree", classes=("ball",)) for each in samples]
            folder.add([replace(each, request=request) for each, request in zip(samples, said, strict=True)], {})
            finish_run(folder)
    out = tmp_path / "all"
    assert main([*(str(tmp_path / name) for name in ("one", "other")), "--out", str(out), "--quiet"]) == 0
    for run in (tmp_path / "one", out):
        assert all("tree" in sample.trust.unnamed for sample in open_run(run)), run
    assert main([str(tmp_path / "one"), str(runs / "first"), "--out", str(tmp_path / "mixed"), "--quiet"]) == 0
    assert "class_table" not in open_run(tmp_path / "mixed").document
    assert open_run(out).document["plan"]["words"] == ["tree", "ball", "cube"]


def test_the_engines_of_all_runs_are_named(runs, tmp_path):
    """Also the one that continued a run of another, and in a merged run of merged runs."""
    fast, torch = ({"engine": name, "dtype": dtype} for name, dtype in (("fast", "fp16"), ("torch", "fp32")))
    continued = {"engine": fast, "mixed": [{"engine": torch, "number": 2}]}
    for name, told, like in (("one", {"engine": fast}, 60), ("two", {"engine": torch}, 61), ("mixed", continued, 62)):
        with RunFolder(tmp_path / name, document(1, 32) | told) as folder:
            folder.add([moved(0, like)], {})
            finish_run(folder)
    names = [["one", "two"], ["one", "mixed"], ["one two", str(runs / "first")]]
    for parts, engines in zip(names, (["fast", "torch"], ["fast", "torch"], ["fast", "torch", "renderer"])):
        out = tmp_path / " ".join(parts).replace(str(runs / "first"), "first")
        assert main([*(str(tmp_path / part) for part in parts), "--out", str(out), "--quiet"]) == 0
        card, page = (out / "README.md").read_text(), (out / "gallery" / "run.js").read_text()
        assert "; engine: " + ", ".join(f"`{name}`" for name in engines) + "\n" in card
        assert "- Engine `torch`: dtype `fp32`" in card and ", ".join(engines) in page
        assert open_run(out).document["engine"] == {"engine": " and ".join(engines)}


def test_the_processors_of_all_runs_are_named(tmp_path):
    """Also where they all call themselves by the same architecture, and in a merged run of merged runs."""
    cpu = {"engine": "fast", "device": "cpu", "device_name": "x86_64"}
    for name, told, like in (
        ("one", {"engine": cpu, "processor": "Xeon"}, 60),
        ("two", {"engine": cpu, "processor": "EPYC"}, 61),
        ("gpu", {"engine": {**cpu, "device": "cuda", "device_name": "H200"}, "processor": "Grace"}, 62),
    ):
        with RunFolder(tmp_path / name, document(1, 32) | told) as folder:
            folder.add([moved(0, like)], {})
            finish_run(folder)
    for parts, told in ((["one", "two"], "`Xeon, EPYC`"), (["one two", "gpu"], "`Xeon, EPYC`")):
        out = tmp_path / " ".join(parts)
        assert main([*(str(tmp_path / part) for part in parts), "--out", str(out), "--quiet"]) == 0
        line = next(line for line in (out / "README.md").read_text().splitlines() if "Versions and device" in line)
        assert f"device_name {told}" in line and "Grace" not in line


def test_the_speed_of_a_merged_run_is_told(runs, tmp_path):
    figure = {"measure": "REL depth", "speed": 0.0054, "exact": 0.0052}
    verdict = {"name": "cache3", "number": 64, "passed": True, "measures": [figure]}
    with RunFolder(tmp_path / "quick", document(1, 32) | {"speed": verdict}) as folder:
        folder.add([moved(0, 60)], {})
        finish_run(folder)
    assert main([*(str(path) for path in (runs / "first", tmp_path / "quick")), "--out", str(tmp_path / "all")]) == 0
    for page in ("README.md", "gallery/run.js"):
        judged = "cache3, approximate; labels of 64 images against exact ones: REL depth 0.0054 for 0.0052"
        assert judged in (tmp_path / "all" / page).read_text()


def test_a_damaged_file_is_taken_over_again(runs, tmp_path, capsys):
    out = tmp_path / "all"
    lines = [str(runs / "first"), str(runs / "second"), "--out", str(out), "--quiet", "--copy"]
    assert main(lines) == 0
    (out / "depth" / "00000003.png").write_bytes(b"no picture")
    assert len(audit(out).findings) == 1
    assert audit_command.main([str(out), "--repair", "--quiet"]) == 4
    assert main(lines) == 0 and audit(out).findings == []


def test_tables_that_continue_one_another_are_joined_and_others_refused_by_name(runs, tmp_path, capsys):
    longer, other = document(2, 32), document(2, 32)
    longer["labels"]["semantic"]["numbers"].append(len(longer["classes"]))
    for classes in (longer["labels"]["semantic"]["classes"], longer["classes"]):
        classes.append("dog")
    for classes in (other["labels"]["semantic"]["classes"], other["classes"]):
        classes[3] = "dog"
    for label in ("instance", "open-vocabulary"):
        of_label = other["labels"][label]["classes"]
        of_label[of_label.index(world.CLASSES[3])] = "dog"
    for name, described in (("longer", longer), ("other", other)):
        with RunFolder(tmp_path / name, described) as folder:
            folder.add([moved(k, 80 + k) for k in range(2)], {})
            finish_run(folder)
    out = tmp_path / "all"
    assert main([str(runs / "first"), str(tmp_path / "longer"), "--out", str(out), "--quiet"]) == 0
    assert open_run(out).document["labels"]["semantic"]["classes"] == longer["labels"]["semantic"]["classes"]
    assert audit(out).findings == []
    assert main([str(runs / "first"), str(tmp_path / "other"), "--out", str(tmp_path / "no"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "semantic.classes has 'dog' where" in said and not (tmp_path / "no").exists()


def test_tables_that_only_one_label_of_each_run_continues_are_refused(runs, tmp_path, capsys):
    """Both give the next number of the run's classes to another class."""
    lines = ["--out", str(tmp_path / "all"), "--quiet"]
    for label, word in (("semantic", "dog"), ("instance", "cat")):
        described = document(2, 32)
        for name in ("numbers", "classes"):
            described["labels"][label][name].append(word if name == "classes" else len(described["classes"]))
        described["classes"].append(word)
        with RunFolder(tmp_path / label, described) as folder:
            folder.add([moved(k, (80 if word == "dog" else 90) + k) for k in range(2)], {})
            finish_run(folder)
    assert main([str(tmp_path / "semantic"), str(tmp_path / "instance"), *lines]) == 2
    assert "number the classes differently" in capsys.readouterr().err and not (tmp_path / "all").exists()


def test_a_merged_run_has_room_for_the_settings_of_all(tmp_path):
    words = tuple(f"{k:05d}" + "x" * 95 for k in range(6000))
    for name, like in (("one", 60), ("other", 70)):
        with RunFolder(tmp_path / name, document(1, 32, classes=words)) as folder:
            folder.add([moved(0, like)], {})
            finish_run(folder)
    out = tmp_path / "all"
    assert main([str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(out), "--quiet"]) == 0
    assert (out / "run.json").stat().st_size > 2**20 and audit(out).findings == []


def test_a_sample_that_was_dropped_is_not_missing(runs, tmp_path, capsys):
    out = tmp_path / "all"
    line = [str(runs / "first"), str(runs / "second"), "--out", str(out), "--json"]
    assert main(line) == 0 and drop.main([str(out), "1", "--quiet"]) == 0
    capsys.readouterr()
    assert main(line) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["complete"] and "resume with" not in told.err and len(open_run(out)) == 8


def test_pictures_of_several_sizes_are_no_source_of_tiles(runs, tmp_path):
    with RunFolder(tmp_path / "large", document(2, 64)) as folder:
        folder.add([rendered(k, 64) for k in range(2)], {})
        finish_run(folder)
    assert main([str(runs / "first"), str(tmp_path / "large"), "--out", str(tmp_path / "all"), "--quiet"]) == 0
    assert "8 of 8 images of 32 × 32 or 64 × 64 pixels" in (tmp_path / "all" / "README.md").read_text()
    with pytest.raises(Refused, match="sample 00000000 has 32 x 32 pixels, expected 64 x 64"):
        SquareSource(tmp_path / "all")


def test_things_are_numbered_anew_and_sizes_told_width_first(runs, tmp_path):
    """Edits keep the ids of their source, which two of one source have in common."""
    for name, like, height in (("one", 80, 24), ("other", 81, 32)):
        sample = moved(0, like)
        things = sample.annotations["instance"]
        numbered = replace(things, ids=np.arange(5, 5 + len(things.masks)))
        labels = {**sample.annotations, "instance": numbered}
        with RunFolder(tmp_path / name, document(1, 32, seed=like)) as folder:
            cut = replace(sample, image=sample.image[:height], annotations=labels)
            folder.add([cut], {"sides": [height, 32]})
            finish_run(folder)
    out = tmp_path / "all"
    assert main([str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(out), "--quiet"]) == 0
    ids = [item["id"] for item in json.loads((out / "instances.json").read_text())["annotations"]]
    assert len(ids) > 2 and ids == [*range(1, len(ids) + 1)]
    assert "2 of 2 images of 32 × 24 or 32 × 32 pixels" in (out / "README.md").read_text()
    assert json.loads((out / "run.json").read_text())["config"]["seed"] == 80


def test_a_run_in_a_folder_whose_name_is_no_utf_8_is_merged(runs, tmp_path, monkeypatch):
    run, out = tmp_path / "caf\udce9", tmp_path / "out"
    shutil.copytree(runs / "first", run)
    monkeypatch.setattr(sys, "argv", ["merge", str(run)])
    assert drop.main([str(run), "1", "--quiet"]) == 0
    assert main([str(run), str(runs / "varied"), "--out", str(out), "--quiet"]) == 0
    assert audit(run).findings == audit(out).findings == []


def test_a_place_inside_of_a_run_is_refused(runs, tmp_path, capsys):
    copy = shutil.copytree(runs / "first", tmp_path / "copy")
    line = [str(runs / name) for name in ("first", "varied")]
    assert main([*line, "--out", str(copy / "new"), "--quiet"]) == 2
    assert f"it lies inside the run folder {copy}" in capsys.readouterr().err and not (copy / "new").exists()


def test_what_differs_is_told_without_digests(runs, tmp_path, capsys):
    places, out = [str(runs / name) for name in ("first", "second")], str(tmp_path / "all")
    assert main([*places, "--out", out, "--quiet"]) == 0
    assert main([*reversed(places), "--out", out, "--quiet"]) == 2
    told = capsys.readouterr().err.splitlines()[0]
    assert "source.0/samples.jsonl: other content there than asked for" in told and not re.search("[0-9a-f]{16}", told)


def test_runs_without_a_sample_are_refused_wherever_samples_are_read(tmp_path, capsys):
    run, out = tmp_path / "empty", str(tmp_path / "out")
    with RunFolder(run, document(2, 32)) as folder:
        folder.add([Quarantined(rendered(k, 32).request, "NaN") for k in range(2)], {})
        finish_run(folder)
    for command, flags, said in (
        (main, [str(run), "--out", out], "holds no sample"),
        (filter.main, ["--where", "presence>=1"], "holds no sample"),
        (split.main, ["--shares", "50,50"], "holds no sample"),
        (edit.main, ["--class", "ball", "--prompt", "a cube", "--out", out], "holds no sample"),
        (convert.main, ["--to", "coco", "--out", out], "no sample to convert"),
    ):
        assert command([str(run), *flags, "--quiet"]) == 2
        assert said in capsys.readouterr().err.splitlines()[0] and not (tmp_path / "out").exists()


def test_a_run_that_goes_on_is_no_source_and_is_converted_so_far(runs, tmp_path, capsys):
    run = tmp_path / "begun"
    with RunFolder(run, document(4, 32)) as folder:
        folder.add([rendered(k, 32) for k in range(2)], {})
    assert main([str(run), str(runs / "first"), "--out", str(tmp_path / "all"), "--quiet"]) == 2
    assert f"{run}: the run is not finished" in capsys.readouterr().err and not (tmp_path / "all").exists()
    assert convert.main([str(run), "--to", "coco", "--out", str(tmp_path / "coco")]) == 0
    assert f"{run}: not finished; converted so far: 2 samples" in capsys.readouterr().err
    before = Source(shutil.copytree(runs / "first", tmp_path / "grows"))
    unseal(before.path)  # as another process does that lets it grow
    assert before.digests == Source(runs / "first").digests
    with pytest.raises(Refused, match="the run is not finished"):
        Source(before.path)


def test_runs_with_other_labels_or_image_files_are_told_apart(runs, tmp_path, capsys):
    for name, config, said in (
        ("jpg", {"image_format": "jpg"}, "its image_format is jpg, that of"),
        ("depth", {"task": ["depth"]}, "its task is depth, that of"),
    ):
        described = document(1, 32)
        described["config"] |= config
        if "task" in config:
            described = {**described, "labels": {"depth": described["labels"]["depth"]}}
        sample = rendered(9, 32)
        labels = {task: label for task, label in sample.annotations.items() if task in described["labels"]}
        with RunFolder(tmp_path / name, described) as folder:
            folder.add([replace(sample, annotations=labels)], {})
            finish_run(folder)
        line = [str(runs / "first"), str(tmp_path / name), "--out", str(tmp_path / "all")]
        assert main([*line, "--quiet"]) == 2
        assert f"{tmp_path / name}: {said} {runs / 'first'}" in capsys.readouterr().err


def test_models_of_several_runs_are_joined_name_by_name():
    first = {"name": "a", "source": "here", "digests": {"unet": "1"}}
    other = {"name": "b", "source": "here", "licence": "MIT", "digests": {"unet": "2"}}
    assert _merge([first, first], _join_models) == first
    joined = _merge([first, other], _join_models)
    assert joined["digests"] == {"0/unet": "1", "1/unet": "2"} and joined["source"] == "here"
    assert joined["licence"] == "MIT" and "a" in joined["name"] and "b" in joined["name"]


def test_bad_input_is_one_sentence_and_writes_nothing(runs, tmp_path, capsys):
    out, first = tmp_path / "all", str(runs / "first")
    for flags, code, said in (
        ([first], 2, "--out is missing"),
        ([first, "--out", str(out)], 2, "expected two or more"),
        ([first, str(tmp_path), "--out", str(out)], 2, "not a run folder"),
        ([first, str(runs / "second"), "--out", str(runs / "first" / "all")], 2, "inside the run folder"),
        ([first, str(runs / "second"), "--kept", "--out", str(out)], 2, "has not been filtered"),
    ):
        assert main([*flags, "--quiet"]) == code
        assert said in capsys.readouterr().err and not out.exists()
    shutil.copytree(runs / "first", tmp_path / "damaged")
    (tmp_path / "damaged" / "images" / "00000001.png").write_bytes(b"no picture")
    assert main([str(tmp_path / "damaged"), str(runs / "second"), "--out", str(out), "--quiet"]) == 4
    assert "datasetdm_fast.audit" in capsys.readouterr().err
    (tmp_path / "damaged" / "images" / "00000001.png").unlink()
    assert main([str(tmp_path / "damaged"), str(runs / "second"), "--out", str(out), "--quiet"]) == 4
    assert "00000001.png is missing or has changed since it was written" in capsys.readouterr().err


def test_a_source_whose_files_are_not_those_of_its_rows_is_damaged(tmp_path):
    write_run(tmp_path / "run", 2, 32)
    source = SquareSource(tmp_path / "run")
    row = source.run[0].row
    name, stored = row.files["depth"]
    Image.new("L", (16, 16)).save(tmp_path / "run" / name)
    other = replace(stored, sha256=sha256_of(tmp_path / "run" / name), size=(tmp_path / "run" / name).stat().st_size)
    for files, role, said in (
        ({**row.files, "depth": (name, other)}, "depth", name),  # of another size
        (row.files, "depth", name),  # changed since
        ({}, "image", "the row of sample 00000000"),
    ):
        with pytest.raises(GateFailed, match=f"{said}.* is missing or has changed") as failure:
            source._pixels(replace(row, files=files), role)
        assert "datasetdm_fast.audit" in failure.value.remedy
    source.side = 64
    with pytest.raises(GateFailed, match="the row of sample 00000000"):
        source._tile(0)


def test_runs_in_shards_are_merged_of_one_size_and_into_an_empty_place():
    sources = [SimpleNamespace(place=f"run{side}", document={"sampling": {"size": side}}) for side in (32, 64)]
    merging = object.__new__(ShardMerging)
    merging.sources = sources
    with pytest.raises(Refused, match="run32 and the others: their images have different sizes"):
        merging._read_samples()


def test_shards_of_several_sizes_are_numbered_by_the_largest_and_dropped_samples_with_them(tmp_path):
    def source(name, size, entries, dropped):
        entries = {
            first // size: ShardEntry(first, stop, 0, 0, 0, {}, {}, {"tar": StoredFile(f"{name}{first}", 1)})
            for first, stop in entries
        }
        ledger = SimpleNamespace(dropped=dropped, entries=entries)
        ledger.source_of = lambda shard: (shard_place(tmp_path / name), shard)
        indices = [k for entry in entries.values() for k in entry.indices if k not in dropped]
        config = {"task": [], "image_format": "png", "shard_size": size}
        document = {"config": config, "sampling": {"size": 32}, "labels": {}, "classes": []}
        run = SimpleNamespace(shards=ledger, indices=indices)
        return SimpleNamespace(place=name, run=run, document=document, filter_digest="")

    sources = [source("a", 5, [(5, 10), (10, 13)], {6, 12}), source("b", 7, [(0, 7)], frozenset())]
    merging = ShardMerging(sources, str(tmp_path / "all"))
    assert merging.layout == {"layout": "shards", "shard_size": 7} and merging.number == 15
    assert [(entry.first, entry.stop) for entry in merging.entries] == [(0, 5), (7, 10), (14, 21)]
    assert [entry.source for entry in merging.entries] == [
        {"place": "../a", "shard": 1},
        {"place": "../a", "shard": 2},
        {"place": "../b", "shard": 0},
    ]
    assert merging.dropped == {1, 9}


def test_a_place_for_shards_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    merging = object.__new__(ShardMerging)
    merging.place = shard_place(tmp_path)
    with pytest.raises(Refused, match="it is not empty"):
        merging.count_existing()


def test_the_licence_of_a_decoder_is_none_in_the_runs_that_have_no_such_decoder():
    runs = [{"decoders": {"semantic": {"digest": "a", "licence": "MIT"}}}, {"decoders": {}}]
    assert _merge_decoders("semantic", runs)["licence"] == "MIT and none"
    assert _merge_decoders("semantic", runs[:1] * 2) == {"digest": "a", "licence": "MIT"}
