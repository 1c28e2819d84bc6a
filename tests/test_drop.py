import json
import os
import shlex
import shutil
from dataclasses import replace

import pytest
from rendered import document, rendered, write_run
from skips import IS_LONG

from datasetdm_fast import audit as audit_command
from datasetdm_fast import convert, drop, filter, restore
from datasetdm_fast.disk import storage
from datasetdm_fast.runs.curation import dropping
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.folder import DROPPED, RunFolder, unseal
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_folder.scores import read_scores


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("drop") / "whole"
    write_run(path, 6)
    return path


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def tree(path):
    """Every file of a run folder with its bytes; two ledgers of the same rows differ in what SQLite counts."""
    skipped = ("state/ledger.sqlite", "state/seal.json")
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if name not in skipped}


def ids(path):
    with open_run(path) as found:
        return [sample.id for sample in found]


def is_whole(path):
    found = audit(path)
    return found.findings == [] and found.is_complete


def test_what_a_killed_process_left_of_dropped_samples_is_removed(run, whole):
    assert drop.main([str(run), "00000001", "--quiet"]) == 0
    before = tree(run)
    for name, source in (("images/00000001.png", "images/00000001.png"), (f"{DROPPED}images/00000002.png",) * 2):
        (run / name).write_bytes((whole / source.removeprefix(DROPPED)).read_bytes())
    assert not is_whole(run)
    with RunFolder(run, open_run(run).document) as folder:
        folder.remove_leftovers()
    assert tree(run) == before


def test_a_dropped_sample_leaves_every_index_and_comes_back_unchanged(run, whole, capsys):
    assert drop.main([str(run), "00000001", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(run),
        "dropped": ["00000001", "00000004"],
        "left": 4,
    }
    left = ["00000000", "00000002", "00000003", "00000005"]
    assert ids(run) == left and is_whole(run)
    assert [json.loads(line)["id"] for line in (run / "samples.jsonl").read_text().splitlines()] == left
    assert audit_command.main([str(run)]) == 0 and "4 of 6 samples (complete, 2 dropped)" in capsys.readouterr().out
    for name in ("instances.json", "keypoints.json"):
        content = json.loads((run / name).read_text())
        assert [image["id"] for image in content["images"]] == [0, 2, 3, 5]
        assert not {1, 4} & {item["image_id"] for item in content["annotations"]}
    assert "00000001" not in (run / "gallery" / "index.html").read_text()
    assert "Dropped samples: 2" in (run / "README.md").read_text()
    outside = [file for file in run.rglob("*00000001*") if "dropped" not in file.parts]
    kept = {file.relative_to(run / "state" / "dropped") for file in run.rglob("*00000001*")}
    assert outside == [] and {file.parts[0] for file in kept} > {"images", "semantic", "depth"}
    assert drop.main([str(run), "1"]) == 0 and "none of 4 samples are dropped; 1 was dropped before" in (
        capsys.readouterr().err
    )
    assert restore.main([str(run), "00000004", "--quiet"]) == 0 and is_whole(run) and len(ids(run)) == 5
    assert restore.main([str(run), "--all", "--quiet"]) == 0 and is_whole(run)
    assert tree(run) == tree(whole) and restore.main([str(run), "--all", "--quiet"]) == 0


def test_exports_made_before_a_drop_are_named(run, capsys):
    assert convert.main([str(run), "--to", "coco", "--quiet"]) == 0
    assert drop.main([str(run), "00000001"]) == 0
    assert f"{run / 'exports'}: was made before" in capsys.readouterr().err
    assert drop.main([str(run), "00000001"]) == 0
    assert "was made before" not in capsys.readouterr().err


def test_a_run_that_is_open_notices_that_samples_were_dropped(run):
    with open_run(run) as found:
        assert found["00000001"].image.size
        assert drop.main([str(run), "00000001", "--quiet"]) == 0
        with pytest.raises(IndexError, match="sample 00000001 is no longer in the ledger"):
            found["00000001"]
        assert len(list(found.rows())) == 5 and found["00000002"].image.size


def test_a_sample_is_no_duplicate_of_a_dropped_one(tmp_path):
    run = tmp_path / "run"
    with RunFolder(run, document(5)) as folder:
        samples = [rendered(k) for k in range(5)]
        folder.add([replace(sample, image=samples[k // 2].image) for k, sample in enumerate(samples)], {})
        finish_run(folder)

    def duplicates():
        return read_scores(open_run(run).ledger, ("duplicate",)).values["duplicate"].tolist()

    assert drop.main([str(run), "4", "--quiet"]) == filter.main([str(run), "--quiet"]) == 0
    assert duplicates() == [0, 1, 0, 1]
    assert restore.main([str(run), "4", "--quiet"]) == filter.main([str(run), "--quiet"]) == 0
    assert drop.main([str(run), "2", "--quiet"]) == 0 and duplicates() == [0, 1, 0, 0] and is_whole(run)
    assert drop.main([str(run), "0", "--quiet"]) == 0 and duplicates() == [0, 0, 0]
    assert restore.main([str(run), "--all", "--quiet"]) == 0 and duplicates() == [0, 1, 0, 1, 0] and is_whole(run)
    assert drop.main([str(run), "0", "4", "--quiet"]) == 0 and duplicates() == [0, 0, 1]
    assert restore.main([str(run), "--all", "--quiet"]) == 0 and duplicates() == [0, 1, 0, 1, 0]
    for id in ("3", "2"):
        assert drop.main([str(run), id, "--quiet"]) == 0
    assert restore.main([str(run), "3", "--quiet"]) == 0 and duplicates() == [0, 1, 0, 0]  # 2 is still out


def test_samples_are_named_by_a_file_or_a_condition(run, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("\ufeff00000003\r\n\n  00000000 \n")
    assert drop.main([str(run), "--file", str(tmp_path / "ids.txt"), "--quiet"]) == 0
    assert ids(run) == ["00000001", "00000002", "00000004", "00000005"]
    assert drop.main([str(run), "--where", "score<2"]) == 2 and "Score them first" in capsys.readouterr().err
    assert filter.main([str(run), "--quiet"]) == 0
    scores = [filter_score(run, id) for id in ids(run)]
    assert drop.main([str(run), "--where", f"sharpness<={min(scores)}", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == ids(run)[scores.index(min(scores))] and len(ids(run)) == 4
    assert drop.main([str(run), "--where", f"sharpness<={min(scores)}", "--quiet"]) == 0
    assert len(ids(run)) == 3 and is_whole(run)
    assert restore.main([str(run), "--file", str(tmp_path / "ids.txt"), "--quiet"]) == 0 and len(ids(run)) == 5
    capsys.readouterr()
    for condition in ("score<2", "not score>=0"):  # these two were never scored, so neither says anything about them
        assert drop.main([str(run), "--where", condition]) == 2 and len(ids(run)) == 5
        assert f"--where: samples of {run} are not scored" in capsys.readouterr().err
    assert filter.main([str(run), "--quiet"]) == drop.main([str(run), "--where", "not score>=0", "--quiet"]) == 0
    assert len(ids(run)) == 5


def test_a_list_may_name_samples_that_are_set_aside(tmp_path, capsys):
    run = tmp_path / "run"
    with RunFolder(run, document(3)) as folder:
        folder.add([rendered(0), replace(rendered(1), rejection="it is blurred"), rendered(2)], {})
        finish_run(folder)
    assert drop.main([str(run), "2", "--dry-run"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == f"{run}: 1 of 2 samples would be dropped"
    (tmp_path / "bad.txt").write_text("00000001\n00000002\n")
    assert drop.main([str(run), "--file", str(tmp_path / "bad.txt")]) == 0
    assert "1 of 2 samples is dropped; 1 is set aside and not in the data set" in capsys.readouterr().err
    assert ids(run) == ["00000000"] and [sample.id for sample in open_run(run, doubtful=True)] == ["00000001"]
    assert restore.main([str(run), "--file", str(tmp_path / "bad.txt")]) == 0
    assert "1 sample brought back; 1 is set aside and not in the data set" in capsys.readouterr().err
    assert ids(run) == ["00000000", "00000002"] and audit(run).findings == []


def filter_score(path, id):
    table = read_scores(open_run(path).ledger, ("sharpness",))
    return float(table.values["sharpness"][table.indices.index(int(id))])


@pytest.mark.parametrize(
    ("command", "line", "said"),
    [
        (drop, [], "names no sample"),
        (drop, ["7"], "no sample has the id 00000007"),
        (drop, ["-1"], "-1"),
        (drop, ["one"], "'one' is not the id of a sample"),
        (drop, ["--file", "none.txt"], "none.txt"),
        (drop, ["--where", "beauty>1"], "beauty"),
        (drop, ["--where", " "], "--where: no value was given"),
        (restore, [], "expected either ids or --all"),
        (drop, ["--file", "empty.txt"], "empty.txt: it contains no id"),
        (restore, ["--file", " "], "--file: no file was given"),
        (restore, ["1", "--all"], "expected either ids or --all"),
        (restore, ["9"], "no sample has the id 00000009"),
    ],
)
def test_what_names_no_sample_is_refused_and_nothing_changes(run, whole, capsys, command, line, said):
    (run.parent / "empty.txt").write_text("\n \n")
    line = [str(run.parent / word) if word == "empty.txt" else word for word in line]
    code = command.main([str(run), *line])
    assert code == (3 if "none.txt" in said else 2)
    assert said in capsys.readouterr().err.splitlines()[0] and tree(run) == tree(whole)
    assert command.main([str(run.parent), "1"]) == 2 and "run folder" in capsys.readouterr().err


def test_the_remedy_of_restore_tells_what_was_dropped(run, capsys):
    assert drop.main([str(run), "2", "--quiet"]) == 0 and restore.main([str(run), "9"]) == 2
    line = shlex.split(capsys.readouterr().err.splitlines()[1].partition("datasetdm_fast.restore ")[2])
    assert restore.main(line) == 0 and capsys.readouterr().out == "00000002\n"


def test_where_run_json_was_changed_it_is_refused_and_the_ledger_keeps_its_copy(run, capsys):
    written = (run / "run.json").read_bytes()
    changed = json.loads(written)
    changed["config"]["seed"] += 1
    (run / "run.json").write_text(json.dumps(changed))
    for command, line in (drop, ["1"]), (filter, []):
        assert command.main([str(run), *line]) == 2
        assert f"{run}/run.json: its bytes are not those that were written" in capsys.readouterr().err
    assert not is_whole(run)
    (run / "run.json").write_bytes(written)
    assert is_whole(run)


def test_a_sample_whose_file_was_damaged_stays_dropped(run, capsys):
    assert drop.main([str(run), "2", "--quiet"]) == 0
    (run / "state/dropped/depth/00000002.png").write_bytes(b"")
    assert restore.main([str(run), "2"]) == 4
    assert "state/dropped/depth/00000002.png has changed since it was written" in capsys.readouterr().err
    assert len(ids(run)) == 5 and [found.place for found in audit(run).findings] == ["state/dropped/depth/00000002.png"]


def test_samples_that_another_process_has_just_dropped_are_passed_over(run, monkeypatch):
    find = dropping._find_known

    def find_then_wait(*arguments):
        found = find(*arguments)
        monkeypatch.setattr(dropping, "_find_known", find)
        dropping.drop(open_run(run), [1])
        return found

    monkeypatch.setattr(dropping, "_find_known", find_then_wait)
    dropping.drop(open_run(run), [1, 2])
    assert is_whole(run) and ids(run) == ["00000000", "00000003", "00000004", "00000005"]


def test_pictures_that_are_symbolic_links_are_dropped_and_restored(run, tmp_path):
    image = run / "images/00000001.png"
    before, elsewhere = image.read_bytes(), image.rename(tmp_path / "elsewhere.png")
    image.symlink_to("../../elsewhere.png")  # which leads nowhere from the folder of dropped samples
    assert drop.main([str(run), "00000001", "--quiet"]) == 0
    assert (run / DROPPED / "images/00000001.png").read_bytes() == before == elsewhere.read_bytes()
    assert restore.main([str(run), "--all", "--quiet"]) == 0 and is_whole(run)


@pytest.mark.parametrize("is_linked", [True, False])
def test_files_have_other_names_before_their_row_moves_and_lose_the_first_after_it(run, monkeypatch, is_linked):
    """No byte is copied where the disk has hard links."""
    steps, syscall, image, written = [], storage.syscall, "images/00000001.png", []
    if not is_linked:
        monkeypatch.setattr(storage, "link", lambda source, path: False)

    def note(name, call, *arguments):
        if name == "sqlite COMMIT":
            steps.append("commit")
        elif name == "open" and str(arguments[0]).endswith("/images") and steps[-1] == "rename":
            steps.append("sync")
        elif name in ("rename", "unlink") and str(arguments[-1]).endswith(image):
            steps.append(name)
        elif name == "write":
            written.append(arguments)
        return syscall(name, call, *arguments)

    with open_run(run) as opened, RunFolder(run, opened.document) as folder:
        monkeypatch.setattr(storage, "syscall", note)
        unseal(run)
        del written[:]
        folder.drop([1])
        assert steps == ["rename", "sync", "commit", "unlink"] and bool(written) != is_linked
        folder.bring_back(folder.ledger.dropped_rows())
        assert steps == ["rename", "sync", "commit", "unlink"] * 2 and bool(written) != is_linked


@pytest.mark.parametrize("command", [drop, restore])
def test_a_killed_process_is_made_good_by_the_same_line(run, tmp_path, command):
    """At some accesses to the disk, and at the last."""
    first, line = tmp_path / "first", ["1", "4", "--quiet"]
    if command is restore:
        assert drop.main([str(run), *line]) == 0
    shutil.copytree(run, first)
    calls = killed_at(command, [str(run), *line], None)
    after = tree(run)
    for place in (*range(0, calls, 15 if IS_LONG else 150), calls - 1):
        shutil.rmtree(run)
        shutil.copytree(first, run)
        killed_at(command, [str(run), *line], place)
        assert audit(run).findings == [], place
        assert command.main([str(run), *line]) == 0
        assert tree(run) == after and is_whole(run), place


def killed_at(command, line, place):
    """Runs a command in a process that ends without a word before its access `place` to the disk; how many it made."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        usual, count = storage.syscall, 0

        def counted(name, call, *arguments):
            nonlocal count
            if count == place:
                os._exit(9)
            count += 1
            return usual(name, call, *arguments)

        storage.syscall = counted
        code = command.main(line)
        os.write(writer, str(count).encode())
        os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    told = os.read(reader, 20)
    os.close(reader)
    assert os.waitstatus_to_exitcode(status) == (0 if place is None else 9)
    return int(told or 0)
