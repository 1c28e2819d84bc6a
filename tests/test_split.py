"""split: samples that were made of one picture stay together, and an export follows the split."""

import json
import os
import shlex
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
from rendered import document, rendered, write_run

from datasetdm_fast import convert, open_run
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.exporting.sources import ExportSource, labels_by_task
from datasetdm_fast.runs.gallery import review
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder import folder as run_folder
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.selections import assign_parts, groups, parse_part, read_split
from datasetdm_fast.split import main
from datasetdm_fast.training.readers import open_data

NUMBER = 20


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run", NUMBER, 32)
    return tmp_path / "run"


def test_samples_with_a_picture_in_common_are_one_group():
    found = groups([("a",), ("b",), ("c", "a"), ("d",), ("b", "d")])
    assert found[0] == found[2] and found[1] == found[3] == found[4] and found[0] != found[1]


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_never_parted_and_shares_are_met(seed):
    draw = np.random.default_rng(seed)
    keys = [(f"picture {draw.integers(400)}",) for _ in range(1000)]
    found = assign_parts(keys, {"train": 80, "val": 10, "test": 10}, seed)
    parts = {}
    for key, part in zip(keys, found):
        assert parts.setdefault(key, part) == part
    counts = [found.count(part) for part in ("train", "val", "test")]
    assert np.abs(np.array(counts) - (800, 100, 100)).max() <= 5
    assert found == assign_parts(keys, {"train": 80, "val": 10, "test": 10}, seed) and found != assign_parts(
        keys, {"train": 80, "val": 10, "test": 10}, seed + 1
    )


@pytest.mark.parametrize("seed", range(3))
def test_large_groups_find_their_part_before_small_ones(seed):
    found = assign_parts([("all",)] * 5 + [(f"{k}",) for k in range(5)], {"a": 50, "b": 50}, seed)
    assert sorted(found) == ["a"] * 5 + ["b"] * 5 and len(set(found[:5])) == 1


def test_a_part_is_one_of_at_least_as_many():
    assert [parse_part(part) for part in ("1/1", "3/16", "16/16")] == [(1, 1), (3, 16), (16, 16)]
    whole = ExportSource([*range(10)], {}, None, None, {})
    assert [whole.take_part(f"{k}/3").run for k in (1, 2, 3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    for wrong in ("0/3", "4/3", "1/0", "1", "a/b", "-1/3", "1/3/5"):
        with pytest.raises(Refused, match="--part .*: expected k/n with k from 1 to n"):
            parse_part(wrong)


def test_a_split_is_sealed_followed_by_convert_and_taken_back(run, tmp_path, capsys):
    assert main([str(run), "--shares", "70,20,10", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == {"train": 14, "val": 4, "test": 2}
    assert audit(run).findings == []
    parts = read_split(run).names
    assert convert.main([str(run), "--to", "coco", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    for part, count in (("train", 14), ("val", 4), ("test", 2)):
        source = open_data(f"coco:{tmp_path}/out/coco[{part}]", 32)
        names = [int(item.id) for item in source]
        assert len(names) == count and {parts[index] for index in names} == {part}
        assert [int(item.id) for item in open_data(f"run:{run}[{part}]", 32)] == names
    assert len(open_data(f"run:{run}[all]", 32)) == NUMBER
    with pytest.raises(Refused, match="no part 'other', it is split into train, val, test"):
        open_data(f"run:{run}[other]", 32)
    ids = []
    for part in ("train", "val", "test"):
        told = json.loads((tmp_path / f"out/coco/annotations/instances_{part}2017.json").read_text())
        ids += [item["id"] for item in told["annotations"]]
    assert len(set(ids)) == len(ids)
    (run / "split.json").write_text((run / "split.json").read_text().replace("train", "taken"))
    assert [finding.place for finding in audit(run).findings] == ["split.json"]
    assert main([str(run), "--undo", "--quiet"]) == 0 and not (run / "split.json").exists()
    assert audit(run).findings == []


@pytest.mark.parametrize("mask, modes", [(0o002, {0o664, 0o775}), (0o022, {0o644, 0o755}), (0o077, {0o600, 0o700})])
def test_whoever_may_write_into_a_run_is_what_the_umask_says(tmp_path, mask, modes):
    """So that the people of a group can go on with each other's runs."""
    before = os.umask(mask)
    try:
        write_run(tmp_path / "run", 2, 32)
        assert main([str(tmp_path / "run"), "--quiet"]) == 0
        review.Review(tmp_path / "run").change({"00000001": "bad"})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")} == modes


@pytest.mark.parametrize("call", ["seal", "remove"])
@pytest.mark.parametrize("killed", [["--shares", "70,30"], ["--undo"]])
def test_a_split_that_was_killed_is_completed_by_the_same_command(run, monkeypatch, killed, call):
    """At the end the run is sealed as it would have been, and an audit notices changes of its files."""
    line = [str(run), "--quiet", *killed]
    if "--undo" in killed:
        assert main([str(run), "--quiet"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            *((run_folder, "seal") if call == "seal" else (run_folder.storage, "remove")),
            Mock(side_effect=KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt) if call == "seal" or "--undo" in killed else nullcontext():
            main.__wrapped__(line)
    (run / "state" / ".seal.json.1.part").write_text("{")
    assert main(line) == 0 and not list(run.rglob(".*"))
    write_run(run.with_name("other"), NUMBER, 32)
    if "--undo" not in killed:
        assert main([str(run.with_name("other")), *line[1:]]) == 0
    assert run_folder.read_seal(run) == run_folder.read_seal(run.with_name("other")) != {}
    assert (run / "split.json").exists() == ("--undo" not in killed)
    (run / "instances.json").write_text("{}")
    assert main([str(run), "--quiet"]) == 0 and [found.place for found in audit(run).findings] == ["instances.json"]


def test_an_export_of_another_split_is_not_taken_for_this_one(run, tmp_path, capsys):
    line = [str(run), "--to", "coco", "--out", str(tmp_path / "out"), "--quiet"]
    assert convert.main(line) == 0 and convert.main(line) == 0
    assert main([str(run), "--shares", "70,30", "--quiet"]) == 0
    assert convert.main(line) == 2 and "(train 20 there, train 14, val 6 asked for)" in capsys.readouterr().err
    line[-2] = str(tmp_path / "again")
    assert convert.main(line) == 0 and convert.main(line) == 0
    assert main([str(run), "--shares", "70,30", "--seed", "1", "--quiet"]) == 0  # as many in each part, but others
    assert convert.main(line) == 2 and main([str(run), "--undo", "--quiet"]) == 0
    assert "it holds an export of other samples or of another split" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"seed": 0}', "{"])
def test_a_damaged_split_can_be_undone(run, content, capsys):
    (run / "split.json").write_text(content)
    with pytest.raises(Refused, match="split.json: not") as stop:
        read_split(run)
    assert stop.value.remedy == f"Run python -m datasetdm_fast.split {run} --undo, then split again."
    assert main([str(run), "--undo", "--quiet"]) == 0 and not (run / "split.json").exists()


def test_a_damaged_file_is_still_noticed_once_the_run_is_split(run):
    (run / "samples.jsonl").write_bytes((run / "samples.jsonl").read_bytes()[:-1] + b" ")
    (run / "gallery/gallery.css").unlink()
    assert main([str(run), "--quiet"]) == 0
    assert [finding.place for finding in audit(run).findings] == ["gallery/gallery.css", "samples.jsonl"]
    assert main([str(run), "--undo", "--quiet"]) == 0
    assert [finding.place for finding in audit(run).findings] == ["gallery/gallery.css", "samples.jsonl"]


def test_variants_of_a_picture_stay_with_it(tmp_path):
    run = tmp_path / "varied"
    with RunFolder(run, document(NUMBER, 32)) as folder:
        for k in range(NUMBER):
            folder.add([rendered(k, 32)], {"group": f"picture {k // 4}"})
        finish_run(folder)
    assert main([str(run), "--shares", "60,40", "--quiet"]) == 0
    parts = read_split(run).names
    assert all(parts[k] == parts[k - k % 4] for k in range(NUMBER)) and set(parts.values()) == {"train", "val"}
    assert main([str(run), "--shares", "60,40", "--no-by-source", "--quiet"]) == 0
    parts = read_split(run).names
    assert any(parts[k] != parts[k - k % 4] for k in range(NUMBER))


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--shares", "a,b"), "expected numbers"),
        (("--shares", "0"), "expected numbers"),
        (("--shares", "0,0"), "not all of them 0"),
        (("--shares", "90,20"), "add up to 110, expected 100\nFor example 81.8,18.2."),
        (("--shares", "2,1,1"), "For example 50,25,25."),
        (("--shares", "80,10,9"), "add up to 99, expected 100"),
        (("--shares", "50,50", "--names", "a"), "expected 2 different names"),
        (("--shares", "50,50", "--names", "a,a"), "expected 2 different names"),
        (("--shares", "50,50", "--names", "a,B/../c"), "expected small letters"),
        (("--undo",), "is not split"),
        (("--undo", "--seed", "1"), "--undo: it removes the split, and takes no other flags"),
        (("--undo", "--no-by-source"), "--undo: it removes the split, and takes no other flags"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(run, capsys, flags, said):
    before = sorted(run.iterdir())
    assert main([str(run), *flags]) == 2
    assert said in capsys.readouterr().err and sorted(run.iterdir()) == before


@pytest.mark.parametrize("shares", ["0.8,0.1,0.1", "33.3,33.3,33.3", "80,20,0"])
def test_shares_are_per_cent_or_parts_of_one(run, shares):
    assert main([str(run), "--shares", shares, "--quiet"]) == 0


def test_why_a_part_is_empty_is_said(tmp_path, capsys):
    write_run(tmp_path / "run", 2, 32)
    assert main([str(tmp_path / "run")]) == 0
    assert "train 2, val 0, test 0; none left for val, test, as there are too few samples" in capsys.readouterr().err


def test_a_run_that_has_grown_is_to_be_split_again(tmp_path, capsys):
    run = tmp_path / "run"
    with RunFolder(run, document(4, 32)) as folder:
        folder.add([rendered(k, 32) for k in range(2)], {})
    assert main([str(run), "--shares", "37.5,62.5,0", "--seed", "3", "--quiet"]) == 0
    as_split = (run / "split.json").read_bytes()
    with RunFolder(run, open_run(run).document) as folder:
        folder.add([rendered(k, 32) for k in range(2, 4)], {})
    line = [str(run), "--to", "coco", "--out", str(tmp_path / "out"), "--quiet"]
    assert convert.main(line) == 2 and not (tmp_path / "out").exists()
    _, told = capsys.readouterr().err.strip().split("Split the run again: python -m datasetdm_fast.split ")
    assert told == f"{run} --shares 37.5,62.5 --names train,val --seed 3"
    assert main(shlex.split(told)) == 0 and convert.main(line) == 0
    again = json.loads((run / "split.json").read_bytes())
    assert again.pop("parts") and again.items() <= json.loads(as_split).items()
    (run / "split.json").write_text(json.dumps({"seed": 0, "by_source": False, "parts": {"train": ["00000000"]}}))
    assert convert.main(line) == 2  # as version 0.1 split it
    assert capsys.readouterr().err.strip().endswith(f"datasetdm_fast.split {run} --no-by-source")


def test_labels_of_a_decoder_are_exported_before_those_of_attention():
    labels = ["depth", "attention", "open-vocabulary", "semantic"]
    assert labels_by_task(labels) == {"semantic": ["semantic", "attention", "open-vocabulary"], "depth": ["depth"]}
