"""The audit finds every planted damage, and nothing in a run folder that is whole."""

import json
import os
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from rendered import document, write_run
from rendered import rendered as render

from datasetdm_fast import audit as command
from datasetdm_fast import drop, gallery, split
from datasetdm_fast.data import Quarantined, Request
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions.composition import Source
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder import audit
from datasetdm_fast.runs.run_folder import folder as run_folder
from datasetdm_fast.runs.run_folder.document import DOCUMENT, DROPPED, LEDGER, read_document
from datasetdm_fast.runs.run_folder.folder import SEAL, THIS, RunFolder, encode_seal, note
from datasetdm_fast.runs.run_folder.ledger import Ledger

DAMAGES = 1000 if os.environ.get("DATASETDM_LONG_TESTS") else 50
NUMBER = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("audited") / "run"
    write_run(path, NUMBER)
    return path


@pytest.fixture
def spoilt(whole, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def places(path: Path) -> list[str]:
    return sorted({finding.place for finding in audit.audit(path, threads=1).findings})


def test_a_whole_run_has_no_findings(whole):
    report = audit.audit(whole)
    assert (
        report.findings == []
        and report.is_complete
        and (report.done, report.quarantined, report.number) == (NUMBER, 0, NUMBER)
    )
    kept = [path for path in whole.rglob("*/*.png") if "gallery" not in path.parts]
    assert report.files == len(kept) and report.bytes == sum(path.stat().st_size for path in kept)


def test_an_audit_tells_how_many_of_all_are_checked(whole):
    told = []
    audit.audit(whole, on_progress=lambda *counts: told.append(counts))
    assert told == [(k, NUMBER) for k in range(1, NUMBER + 1)]


def damage(path: Path, dice: random.Random) -> tuple[str, set[str]]:
    """One flip, truncation, swap or deletion; what was done, and the files that were hit."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    kind = dice.choice(("flip", "cut", "swap", "delete"))
    chosen = dice.choice([file for file in files if file.stat().st_size] if kind != "delete" else files)
    name = chosen.relative_to(path).as_posix()
    data = bytearray(chosen.read_bytes())
    if kind == "flip":
        place = dice.randrange(len(data))
        data[place] ^= 1 << dice.randrange(8)
        chosen.write_bytes(data)
    elif kind == "cut":
        chosen.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "delete":
        chosen.unlink()
    else:
        other = dice.choice([file for file in files if file.read_bytes() != bytes(data)])
        chosen.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return f"swap of {name} and {other.relative_to(path)}", {name, other.relative_to(path).as_posix()}
    return f"{kind} of {name}", {name}


def test_every_planted_damage_is_found(whole, tmp_path):
    missed = []
    for seed in range(DAMAGES):
        path = Path(shutil.copytree(whole, tmp_path / "run"))
        done, hit = damage(path, random.Random(seed))
        found = places(path)
        # A description or ledger that cannot be read hides the rest; otherwise every file that was hit is named.
        if not found or not (hit <= set(found) or hit & {DOCUMENT, LEDGER, SEAL} & set(found)):
            missed.append(f"seed {seed}: {done}: {found}")
        shutil.rmtree(path)
    print(f"{DAMAGES} planted damages, {DAMAGES - len(missed)} found")
    assert missed == []


@pytest.mark.parametrize("name", ["images/00000001.png", "semantic/00000002.png", "depth/00000003.png"])
def test_a_damaged_sample_says_how_to_make_it_again(spoilt, capsys, name):
    (spoilt / name).write_bytes((spoilt / name).read_bytes()[:-1])
    assert command.main([str(spoilt)]) == 4
    out, err = capsys.readouterr()
    id = Path(name).stem
    assert out.startswith(f"{name}: has ") and out.endswith(
        f"Make it again: python -m datasetdm_fast.generate --out {spoilt} --only {id}\n"
    )
    assert err.splitlines()[0] == f"{spoilt}: 1 finding in 1 file" and len(err.splitlines()) == 2


def test_the_line_that_mends_a_sample_is_quoted(spoilt, tmp_path, capsys, monkeypatch):
    place = shutil.copytree(spoilt, tmp_path / "it's my run")
    (place / "images/00000001.png").unlink()
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "-new").parent)
    for named, path in ((str(place), str(place)), (f"file://{place}", str(place)), ("./-new", "./-new")):
        assert command.main([named]) == 4
        line = capsys.readouterr().out.strip().partition("Make it again: ")[2]
        assert shlex.split(line)[3:] == ["--out", path, "--only", "00000001"]


def test_the_report_as_json(spoilt, capsys):
    assert command.main([str(spoilt), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["findings"] == [] and told["complete"] and told["done"] == NUMBER
    assert told["set_aside"] == 0 and "quarantined" not in told  # as earlier versions called it
    (spoilt / "images/00000000.png").unlink()
    assert command.main(["--json", str(spoilt), "--threads", "1"]) == 4
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert finding["place"] == "images/00000000.png" and finding["what"] == "is not there" and finding["remedy"]


def test_files_that_no_sample_has_are_found_in_every_folder_of_the_product(spoilt):
    folders = ["depth", "gallery/depth", "gallery/details", "gallery/pages", "gallery/sheets", "images", "state"]
    for name in folders:
        (spoilt / name / "zzz.png").write_bytes(b"")
        (spoilt / name / ".zzz.png.1.part").write_bytes(b"")  # which a process that was killed leaves
    (spoilt / "doubtful" / "images").mkdir(parents=True, exist_ok=True)
    (spoilt / "doubtful" / "images" / "zzz.png").write_bytes(b"")
    (spoilt / "notes").mkdir()
    (spoilt / "notes" / "zzz.png").write_bytes(b"")
    assert places(spoilt) == [f"{name}/zzz.png" for name in sorted([*folders, "doubtful/images"])]


def test_index_files_and_pictures_come_back_as_the_remedy_says(spoilt):
    """Deleting what is damaged and running the line again makes the folder whole."""
    before = {
        file.relative_to(spoilt): file.read_bytes()
        for file in spoilt.rglob("*")
        if file.is_file() and "state" not in file.parts
    }
    for name in ("samples.jsonl", "gallery/index.html", "gallery/depth/00000001.png"):
        (spoilt / name).write_bytes(b"damaged")
    assert places(spoilt) == ["gallery/depth/00000001.png", "gallery/index.html", "samples.jsonl"]
    for name in ("samples.jsonl", "gallery/index.html", "gallery/depth/00000001.png"):
        (spoilt / name).unlink()
    with RunFolder(spoilt, document(NUMBER)) as folder:
        finish_run(folder)
    assert places(spoilt) == []
    assert before == {
        file.relative_to(spoilt): file.read_bytes()
        for file in spoilt.rglob("*")
        if file.is_file() and "state" not in file.parts
    }


@pytest.mark.parametrize(("seed", "is_planned"), [(100_000_008, True), (1, False), (200_000_015, False)])
def test_a_sample_in_the_place_of_another_has_the_next_seed_of_its_turn(tmp_path, seed, is_planned):
    sample = render(0, 32)
    with RunFolder(tmp_path, document(2, 32)) as folder:
        folder.add([replace(sample, request=replace(sample.request, index=1, seed=seed))], {"turn": 1})
    told = [finding.what for finding in audit.audit(tmp_path).findings if "the plan says" in finding.what]
    assert told == ([] if is_planned else [f"sample 00000001 has the seed {seed}, the plan says 100000008"])


def test_a_run_that_goes_on_is_whole_so_far(tmp_path, capsys):
    with RunFolder(tmp_path / "run", document(3)) as folder:
        folder.add([render(0), Quarantined(Request(1, "a ball", 1), "NaN")], {})
        storage.publish({tmp_path / "run/images/00000002.png": b"of the batch that was killed"})
        assert audit.audit(tmp_path / "run").findings == []  # while it is being written
    assert command.main([str(tmp_path / "run")]) == 0
    assert "whole, 1 of 3 samples (1 still to be made)" in capsys.readouterr().out


def test_damaged_files_of_dropped_samples_are_found(spoilt):
    assert drop.main([str(spoilt), "1", "2", "--quiet"]) == 0 and places(spoilt) == []
    hit = [f"{DROPPED}images/00000001.png", f"{DROPPED}semantic/00000002.png"]
    (spoilt / hit[0]).write_bytes(b"no picture")
    (spoilt / hit[1]).unlink()
    assert places(spoilt) == hit and "leave 00000002 dropped" in audit.audit(spoilt).findings[1].remedy
    for path in (spoilt / DROPPED).rglob("00000002.*"):
        path.unlink()
    assert places(spoilt) == hit[:1]
    shutil.rmtree(spoilt / DROPPED)
    assert places(spoilt) == []


def test_dropped_samples_are_not_still_to_be_made(monkeypatch, capsys):
    report = audit.Report("runs/a", number=10, done=5, quarantined=1, files=5, bytes=2_500_000, findings=[], dropped=2)
    monkeypatch.setattr(command, "audit_place", lambda *_: report)
    assert command.main(["runs/a"]) == 0
    assert capsys.readouterr().out == (
        "runs/a: whole, 5 of 10 samples (2 still to be made, 2 dropped), 5 files, 2.5 MB read\n"
    )


@pytest.mark.parametrize(("made_by", "remedy"), [("generate", "--out runs/a --only 00000000"), ("label", "--repair")])
def test_a_damaged_sample_is_made_alone_where_generate_made_it(tmp_path, made_by, remedy):
    described = document(1)
    with RunFolder(tmp_path / "run", described) as folder:
        folder.add([render(0)], {})
        (row,) = folder.ledger.rows()
    described |= {} if made_by == "generate" else {"command": made_by}
    for content in (b"", b"x" * 9**5):
        faults = list(audit.check_sample(Path("runs/a"), described, row, lambda row, role, content=content: content))
        sizes = {name: stored.size for name, stored in row.files.values()}
        wrong = {name: f"has {len(content)} bytes, {size} were written" for name, size in sizes.items()}
        assert {fault.place: fault.what for fault in faults} == wrong
        assert all(remedy in fault.remedy for fault in faults)
    row = replace(row, request=replace(row.request, index=1))  # of a sample that the plan lacks nothing else is said
    (fault,) = audit.check_sample(Path("runs/a"), described, row, lambda row, role: b"")
    assert "has a sample 1, but the plan has 1" in fault.what


def test_findings_are_counted_by_their_files_and_nothing_is_taken_out_where_no_sample_is_damaged(monkeypatch, capsys):
    findings = [audit.Finding(place, "is not there", "Mend it.") for place in ("a", "a", "b")]
    report = audit.Report("runs/a", 9, 9, 0, 5, 100, findings)
    monkeypatch.setattr(command, "audit_place", lambda *_: report)
    monkeypatch.setattr(command, "repair", lambda report: pytest.fail("nothing to be taken out"))
    assert command.main(["runs/a", "--repair"]) == 4
    assert "runs/a: 3 findings in 2 files" in capsys.readouterr().err


def edit(path: Path, statement: str) -> None:
    with sqlite3.connect(path / LEDGER) as connection:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ('UPDATE samples SET seed = 7 WHERE "index" = 1', "the seed 7, the plan says 1"),
        ('UPDATE samples SET "index" = 9 WHERE "index" = 1', "a sample 9, but the plan has 4"),
        ("UPDATE samples SET files = '{}' WHERE \"index\" = 1", "has the files []"),
        (
            "UPDATE samples SET files = json_set(files, '$.image[2]', '../00000001.png') WHERE \"index\" = 1",
            "leads out of its folder",
        ),
        ('UPDATE samples SET labels = replace(labels, \'"area":\', \'"area":1\') WHERE "index" = 3', "pixels in"),
        (
            'UPDATE samples SET labels = replace(labels, \'"counts":"\', \'"counts":"0\') WHERE "index" = 3',
            "instance: ",
        ),
        ('UPDATE samples SET labels = replace(labels, \'"max":\', \'"max":1\') WHERE "index" = 3', "its depth map has"),
        (
            "UPDATE samples SET labels = replace(labels, 'num_keypoints\":', 'num_keypoints\":1') WHERE \"index\" = 3",
            "joints, the ledger says",
        ),
        ("UPDATE samples SET labels = '{}' WHERE \"index\" = 1", "not the form"),
        ("UPDATE samples SET labels = 'x' WHERE \"index\" = 1", "is damaged"),
        ("UPDATE samples SET prompt = x'00ff' WHERE \"index\" = 1", "is damaged"),
        ('DELETE FROM samples WHERE "index" = 1', "no sample of the ledger has this file"),
        ("DROP TABLE samples", "no such table"),
        ("UPDATE notes SET value = '{' WHERE name = 'run'", "its note of run.json is damaged (it: not readable"),
        ("UPDATE notes SET value = '{}' WHERE name = 'run'", "its note of run.json is damaged (versions is missing)"),
    ],
)
def test_a_ledger_changed_by_hand_is_found_without_the_seal(spoilt, statement, what):
    if "num_keypoints" in statement:
        with Ledger(spoilt / LEDGER, read_only=True) as ledger:
            posed = next(row.request.index for row in ledger.rows() if row.labels["pose"])
        statement = statement.replace('"index" = 3', f'"index" = {posed}')
    edit(spoilt, statement)
    seal = json.loads((spoilt / SEAL).read_text())
    told = " ".join(finding.what for finding in audit.audit(spoilt).findings)
    assert what in told
    assert storage.sha256_of(spoilt / LEDGER) != seal[LEDGER]
    del seal[THIS]
    (spoilt / SEAL).write_bytes(encode_seal({**seal, LEDGER: storage.sha256_of(spoilt / LEDGER)}))
    assert what in " ".join(finding.what for finding in audit.audit(spoilt).findings)


def test_the_first_sample_may_be_quarantined(spoilt):
    edit(spoilt, "UPDATE samples SET status = 'set-aside' WHERE \"index\" = 0")
    assert not [finding for finding in audit.audit(spoilt).findings if "but the plan has" in str(finding)]


def test_a_prompt_changed_by_hand_is_found_by_the_seal(spoilt):
    edit(spoilt, "UPDATE samples SET prompt = 'another' WHERE \"index\" = 1")
    assert places(spoilt) == [LEDGER]


def test_what_is_no_run_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments in (
        [],
        [str(tmp_path)],
        [str(tmp_path / "none")],
        [str(tmp_path / "file")],
        ["\0"],
        [f"file://{tmp_path}/none"],
        [str(tmp_path), "more"],
        ["--threads", "-1", "x"],
    ):
        assert command.main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 2
        told = ["more", "\0", arguments[0].removeprefix("file://")] if arguments else [""]
        assert any(word in err or word in arguments for word in told), err
        assert "did you mean file?" not in err
    with pytest.raises(Refused):
        audit.audit(tmp_path)


def test_a_spoilt_run_json_is_to_be_restored_itself(spoilt):
    (spoilt / "run.json").write_text("{")
    found = [(finding.place, finding.remedy) for finding in audit.audit(spoilt).findings]
    remedy = "Restore run.json from a copy; the ledger of a run folder holds its content under notes."
    assert found == [("run.json", remedy)] * 2


def test_a_run_that_is_described_nowhere_has_its_samples_counted(spoilt):
    edit(spoilt, "DELETE FROM notes WHERE name = 'run'")
    (spoilt / "run.json").write_text("{")
    report = audit.audit(spoilt)
    assert (report.number, report.done) == (0, NUMBER)
    assert [finding.place for finding in report.findings] == ["run.json"]


def test_what_was_written_after_the_run_was_finished_is_found(spoilt):
    (spoilt / f"{LEDGER}-wal").write_bytes(b"")
    assert places(spoilt) == []
    (spoilt / f"{LEDGER}-wal").write_bytes(b"a page")
    assert f"{LEDGER}-wal" in places(spoilt)


def test_label_files_of_another_size_are_named_for_each_label(whole):
    document = read_document(whole)
    with Ledger(whole / LEDGER, read_only=True) as ledger:
        row = ledger.row(1)
    arrays = {role: np.array(Image.open(whole / name)) for role, (name, _) in row.files.items()}
    assert list(audit._check_label("depth", row, arrays, document)) == []
    for other in ({"depth": arrays["depth"][:-1]}, {"image": arrays["image"][..., :2]}, {"image": arrays["image"][1:]}):
        (told,) = audit._check_label("depth", row, arrays | other, document)
        assert told == "its files are not 64 x 64 pixels"
    wide = replace(row, recipe=row.recipe | {"sides": [60, 62]})
    assert list(audit._check_label("depth", wide, arrays, document)) == ["its files are not 62 x 60 pixels"]
    del arrays["image"]  # which could not be read
    assert list(audit._check_label("depth", row, arrays, document)) == []


def test_a_run_whose_ledger_is_gone_names_the_command_that_made_it(spoilt, capsys):
    document = json.loads((spoilt / "run.json").read_text()) | {"command": "edit"}
    (spoilt / "run.json").write_text(json.dumps(document))
    (spoilt / "state" / "ledger.sqlite").unlink()
    for reading in (split, gallery):
        assert reading.main([str(spoilt)]) == 2
        error = capsys.readouterr().err
        assert "holds no state/ledger.sqlite" in error
        assert "Run python -m datasetdm_fast.edit with its flags again" in error


def test_a_run_that_was_copied_without_its_state_is_not_whole(spoilt):
    shutil.rmtree(spoilt / "state")
    assert [(found.place, found.what) for found in audit.audit(spoilt).findings] == [(LEDGER, "is not there")]


def test_a_run_that_was_killed_before_its_ledger_was_there_is_whole_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "Ledger", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path, document(NUMBER, 64))
    assert (tmp_path / SEAL).exists() and audit.audit(tmp_path).findings == []
    (tmp_path / LEDGER).write_bytes(b"")  # as SQLite begins it
    assert audit.audit(tmp_path).findings == []


def test_a_seal_changed_by_hand_is_found(spoilt):
    seal = json.loads((spoilt / SEAL).read_text())
    (spoilt / SEAL).write_text(json.dumps(seal))
    assert places(spoilt) == [SEAL]
    digest = seal["README.md"]
    seal["README.md"] = digest[:5] + ("0" if digest[5] != "0" else "1") + digest[6:]
    (spoilt / SEAL).write_text(json.dumps(seal, indent=2, sort_keys=True) + "\n")
    assert places(spoilt) == ["README.md", SEAL]


def test_the_seal_of_hundreds_of_thousands_of_samples_is_read(spoilt):
    digests = json.loads((spoilt / SEAL).read_text())
    del digests[THIS]
    digests |= {f"gallery/details/{k:06d}.js": "" for k in range(10, 30_000)}  # files that are not there, as sealed
    (spoilt / SEAL).write_bytes(encode_seal(digests))
    assert (spoilt / SEAL).stat().st_size > 2**20 and places(spoilt) == []
    assert Source(spoilt).digests["samples.jsonl"] == digests["samples.jsonl"]


def test_a_depth_map_and_its_picture_in_each_other_s_place_are_both_found(spoilt):
    both = [spoilt / "depth/00000001.png", spoilt / "gallery/depth/00000001.png"]
    first, second = (path.read_bytes() for path in both)
    both[0].write_bytes(second)
    both[1].write_bytes(first)
    assert places(spoilt) == ["depth/00000001.png", "gallery/depth/00000001.png"]


def test_notes_keep_the_seal(spoilt):
    note(spoilt, "verified", {"agrees": True})
    assert places(spoilt) == [] and read_document(spoilt)["verified"] == {"agrees": True}
    note(spoilt, "verified", {"agrees": False})
    assert places(spoilt) == [] and read_document(spoilt)["verified"] == {"agrees": False}


def test_a_note_of_a_run_without_samples_begins_no_ledger(whole, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / DOCUMENT).write_bytes((whole / DOCUMENT).read_bytes())
    note(tmp_path, "verified", {"agrees": True})
    assert read_document(tmp_path)["verified"] == {"agrees": True} and not (tmp_path / LEDGER).exists()
    assert not (tmp_path / SEAL).exists()


def test_the_audit_loads_no_torch(whole):
    code = (
        f"import sys; from datasetdm_fast.audit import main; sys.exit(main([{str(whole)!r}]) or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_of_many_findings_the_first_are_listed(spoilt, monkeypatch, capsys):
    monkeypatch.setattr(command, "SHOWN", 1)
    for name in ("images/00000000.png", "images/00000001.png", "depth/00000001.png"):
        (spoilt / name).unlink()
    assert command.main([str(spoilt)]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1] == "and 2 more; --json lists them all"


def test_a_file_in_the_form_of_a_samples_that_no_sample_has_is_found_wherever_it_lies(whole, tmp_path):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    number = len([*(path / "images").iterdir()])
    names = [f"images/{number:08d}.png", "images/00000000.jpg", f"depth/{number:08d}.png", "semantic/00000000.txt"]
    for name in names:
        (path / name).write_bytes((path / "images/00000000.png").read_bytes())
    found = {finding.place for finding in audit.audit(path).findings if "no sample of the ledger" in finding.what}
    assert found == set(names)
