import base64
import errno
import fcntl
import gc
import importlib.util
import io
import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from rendered import TASKS, document, rendered, write_run

from datasetdm_fast.config import SHARD_SIZE
from datasetdm_fast.data import DepthMap, Instances, Keypoints, Quarantined, Request, SemanticMap, Trust
from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.labels import check_numbers, label_files, number_classes
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.jobs import writing
from datasetdm_fast.runs.jobs.run import count_rows
from datasetdm_fast.runs.run_folder import folder as run_folder
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.document import (
    CLAIMS,
    EXPORTS,
    LOCK,
    check_config,
    check_document,
    check_same,
    differences,
    read_document,
    shard_size,
    sides,
)
from datasetdm_fast.runs.run_folder.folder import RunFolder, layer_with_picture
from datasetdm_fast.runs.run_folder.indexes import Lines
from datasetdm_fast.runs.run_folder.indexes.coco import AnnotationList, first_number
from datasetdm_fast.runs.run_folder.ledger import (
    DONE,
    DOUBTFUL,
    QUARANTINED,
    Ledger,
    Row,
    RowFile,
    canonical,
    decode_trust,
)
from datasetdm_fast.runs.run_folder.reader import StoredSample, open_run

pytestmark = pytest.mark.core

MAPS = ("semantic", "open_vocabulary")


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    write_run(path, 12)
    return path


def tree(path):
    """Every file of a run folder but its state, with its bytes."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and "state" not in file.parts
    }


def test_rows_come_back_whole(tmp_path):
    row = Row(
        Request(3, "a 🎈 'ball'\u202e", 2**63 - 1, ("ball",)),
        {"steps": 50},
        {"image": RowFile("images/3.png", StoredFile("ab" * 32, 5))},
        {"depth": {"min": 0.5}},
    )
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([row])
        assert ledger.row(3) == row and list(ledger.rows()) == [row]
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.row(3) == row and ledger.row(4) is None


def test_a_commit_is_all_or_nothing(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(sqlite3.IntegrityError):
            ledger.commit([Row(Request(0, "a", 0), {}), Row(Request(1, "b", 1), {}, status="lost")])
        assert ledger.count() == 0


def row(index, **changes):
    return Row(Request(index, "a ball", index), {}, **changes)


def test_a_later_row_takes_the_place_of_an_earlier(tmp_path):
    """As where a sample that was set aside is made after all."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([row(1, status=QUARANTINED, reason="NaN"), row(0)])
        assert (ledger.count(), ledger.count(QUARANTINED), ledger.indices(QUARANTINED)) == (1, 1, [1])
        ledger.commit([row(1)])
        assert (ledger.count(), ledger.count(QUARANTINED), ledger.indices()) == (2, 0, [0, 1])
        assert ledger.row(1) == row(1) and [found.request.index for found in ledger.rows()] == [0, 1]


def test_samples_are_tallied_by_class_and_those_outside_of_the_domain_counted(tmp_path):
    statuses = (DONE, DOUBTFUL, QUARANTINED, DOUBTFUL, DONE, DOUBTFUL)  # two a class in turn, of two classes
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        distances = (0.5, 1.0, None, 1.001, 2.0, None)
        trusts = [Trust(domain=distance) for distance in distances]
        rows = [Row(Request(k, "a", k), {}, status=each, trust=trusts[k]) for k, each in enumerate(statuses)]
        ledger.commit(rows)
        assert ledger.tally(2, 2) == [(4, 2), (2, 1)] and ledger.count_trust() == (0, 2, 4)
        assert ledger.count_trust(4) == (0, 1, 3)
        ledger.move([5])
        assert ledger.tally(2, 2) == [(4, 2), (2, 1)] and [made for made, _ in ledger.tally(1, 3)] == [2, 2, 2]
        ledger.commit([Row(Request(7, "a", 7), {}, status=QUARANTINED, reason="NaN")])
        assert ledger.tally(2, 2) == [(4, 2), (3, 1)]


def test_a_range_of_the_ledger_begins_with_its_first_and_ends_before_its_last(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([row(2), row(3, status=QUARANTINED), row(4), row(7)])
        assert (
            ledger.indices_between(3, 7) == {3, 4}
            and ledger.indices_between(7, 7) == set()
            and ledger.indices_between(0, 100) == {2, 3, 4, 7}
        )


def test_a_commit_makes_the_index_files_out_of_date_and_nothing_else(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.note("indexed", "a"), ledger.note("other", "b"), ledger.note("other", "c")
        ledger.commit([row(0)])
        assert ledger.read_note("indexed") is None and ledger.read_note("other") == "c" and ledger.damage() == []


def test_threads_read_through_one_connection_at_once(tmp_path):
    with closing(sqlite.connect(path := tmp_path / "x.sqlite", "CREATE TABLE s (a)")) as database:
        database.execute_many("INSERT INTO s VALUES (?)", [(number,) for number in range(100)])
    shared = sqlite.connect_to_read(path)

    def read(number: int) -> int:
        return shared.execute("SELECT a FROM s WHERE a = ?", (number % 100,))[0][0]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4000))) == [number % 100 for number in range(4000)]
    shared.close()


def test_a_ledger_is_not_settled_while_it_is_read(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([row(k) for k in range(50)])
        with Ledger(tmp_path / "ledger.sqlite", read_only=True) as reader:
            reading = reader.rows()
            next(reading)
            ledger.commit([row(50)])
            ledger._database.execute("PRAGMA busy_timeout=100")  # in place of thirty seconds
            assert not ledger.settle()
            assert len(list(reading)) == 49
        assert ledger.settle() and ledger.count() == 51


def test_a_finished_ledger_that_changes_while_it_is_read_is_told(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.commit([row(k) for k in range(200)])
        ledger.settle()
    with Ledger(path, read_only=True) as reader:
        reading = reader.rows()
        next(reading)
        assert not reader.is_outdated()
        with Ledger(path) as ledger:
            ledger.move(range(0, 200, 2))
            ledger.settle()
        with pytest.raises(Missing, match="another process changed it while it was read"):
            list(reading)
    with Ledger(path, read_only=True) as reader:
        os.utime(path, ns=(1, 1))  # of as many bytes as before
        assert reader.is_outdated()
    with Ledger(path, read_only=True) as reader:
        shutil.copy(path, tmp_path / "new")  # of that time, too, where a file system tells times to two seconds
        os.utime(tmp_path / "new", ns=(1, 1))
        (tmp_path / "new").replace(path)
        assert reader.is_outdated()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(Missing, match="lock: the file system cannot lock files") as stop:
        with storage.hold_lock(tmp_path / "lock"):
            raise AssertionError("nobody holds a lock there")
    assert stop.value.remedy == "Use a folder on a local disk."  # not every command has --out


def test_all_that_a_ledger_says_follows_what_became_of_a_sample(tmp_path):
    """Words, ids and counts are of the data set alone; what takes the place of a row takes that of its tracings."""
    ids = [{"instance": [{"id": number}]} for number in (7, 99)]
    words, stored = ("ball", "cube"), StoredFile("ab" * 32, 5)
    first = replace(row(0, labels=ids[0], tracings={"outlines": [1]}), trust=Trust(confidence=0.0))
    second = replace(
        row(1, labels=ids[1], status=DOUBTFUL), files={"image": RowFile("doubtful/images/00000001.png", stored)}
    )
    first, second = (replace(each, request=replace(each.request, classes=words)) for each in (first, second))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:

        def tracings():
            return [each.tracings for each in ledger.rows(DONE, DOUBTFUL, parts=("tracings",))]

        ledger.commit([first, second])
        assert ledger.class_words() == [(0, words)] and ledger.last_record("instance") == 7
        ledger.commit([replace(row(2), labels={"instance": [{}] * 7})])
        assert ledger.last_record("instance") == 8  # records, of which one has an id
        ledger.forget([2])
        assert ledger.row(1) == second and ledger.row(0) == replace(first, tracings={})
        assert second.group == "ab" * 8 and replace(second, recipe={"group": "x"}).group == "x"
        assert tracings() == [{"outlines": [1]}, {}]
        ledger.commit([replace(first, tracings={"outlines": [2]})])
        assert tracings() == [{"outlines": [2]}, {}]
        ledger.note("indexed", "yes")
        ledger.add_scores([(0, "score", 0.5)])
        assert ledger.read_note("indexed") is None
        ledger.note("indexed", "yes")
        ledger.move([0])
        assert ledger.read_note("indexed") is None and ledger.indices_between(0, 9) == {0, 1} and not ledger.indices()
        ledger.move([0], is_back=True)
        assert tracings() == [{"outlines": [2]}, {}]
        ledger.forget([0])
        ledger.commit([row(0)])
        assert tracings() == [{}, {}]


def test_one_value_has_one_spelling():
    assert canonical({"b": 1, "a": [1, "é"]}) == canonical({"a": (1, "é"), "b": 1}) == '{"a":[1,"é"],"b":1}'
    with pytest.raises(ValueError):
        canonical(float("nan"))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("files", '{"image":["%s",1,"../../etc/passwd"]}' % ("A" * 43)),
        ("files", '{"image":["%s",1,"/etc/passwd"]}' % ("A" * 43)),
        ("files", '{"image":["",1]}'),
        ("files", "[]"),
        ("labels", "[]"),
        ("recipe", "nothing"),
        ("classes", "7"),
        ("classes", "[7]"),
        ("prompt", b"bytes"),
    ],
)
def test_a_row_of_another_form_is_refused_by_its_number(tmp_path, column, value):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([row(3)])
        ledger._database.execute(f"UPDATE samples SET {column} = ?", (value,))
        with pytest.raises(Refused, match="the row of sample 3 is damaged"):
            ledger.row(3)


def test_ledger_survives_power_loss_settings(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger._database.execute("PRAGMA journal_mode") == [("wal",)]
        assert ledger._database.execute("PRAGMA synchronous") == [(2,)]


def test_broken_ledger_is_refused(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(Refused, match="not a readable ledger"):
        Ledger(tmp_path / "ledger.sqlite")


def test_publish_leaves_nothing_behind_on_a_full_disk(tmp_path, monkeypatch):
    def full(handle, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(Missing, match="full"):
        storage.publish({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_publish_writes_what_short_writes_leave(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
    storage.publish({tmp_path / "a": b"0123456789"})
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_file_that_grows_beyond_what_is_read_of_it_is_refused(tmp_path, monkeypatch):
    path, syscall = tmp_path / "list.txt", storage.syscall
    path.write_bytes(b"12345")
    assert storage.read(path, 5) == b"12345"

    def append(name, call, *arguments):
        if name == "read" and path.stat().st_size == 5:
            with path.open("ab") as file:
                file.write(b"67")
        return syscall(name, call, *arguments)

    monkeypatch.setattr(storage, "syscall", append)
    with pytest.raises(Refused, match="grows while it is read"):
        storage.read(path, 5)


def test_a_file_that_one_process_may_create_or_move_is_durable_before_and_after_it_has_its_name(tmp_path, monkeypatch):
    calls, syscall = [], storage.syscall

    def note(name, call, *arguments):
        if name == "fsync":
            calls.append(Path(os.readlink(f"/proc/self/fd/{arguments[0]}")).name)
        elif name in ("link", "rename"):
            calls.append(name)
        return syscall(name, call, *arguments)

    monkeypatch.setattr(storage, "syscall", note)
    path = tmp_path / "manifest" / "00003.json"
    assert storage.create(path, b"{}") and path.read_bytes() == b"{}" and not storage.create(path, b"[]")
    assert calls[:4] == [tmp_path.name, storage.part_of(path).name, "link", "manifest"]
    storage.move(path, path.with_name("00004.json"))
    assert calls[-3:] == ["00003.json", "rename", "manifest"]
    calls.clear()
    storage.publish({path.with_name(name): b"1" for name in ("a", "b")})
    assert calls == [*(storage.part_of(path.with_name(name)).name for name in "ab"), *["rename"] * 2, "manifest"]


def test_a_lock_is_shared_by_those_who_share_it_and_held_by_one_alone(tmp_path):
    path = tmp_path / "lock"
    with storage.hold_lock(path, is_shared=True), storage.hold_lock(path, is_shared=True, patience=0):
        with pytest.raises(Refused, match="another process"), storage.hold_lock(path, patience=0):
            pass
    with storage.hold_lock(path, patience=0), pytest.raises(Refused, match="another process"):
        with storage.hold_lock(path, is_shared=True, patience=0):
            pass


def test_a_lock_that_its_holder_has_removed_is_not_taken(tmp_path, monkeypatch):
    """As of an export that another process completes at this moment."""
    path, lock = tmp_path / "lock", fcntl.flock

    def lock_late(handle, kind):
        path.unlink(missing_ok=True)
        lock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with pytest.raises(Refused, match="another process is writing"), storage.hold_lock(path, patience=0):
        pass


def test_a_folder_is_held_by_one_process_in_turn(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    with storage.in_turn(tmp_path), pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_annotations_go_on_after_those_of_all_labels_before(tmp_path):
    labels = {f"instance{name}": {} for name in ("", ":a", ":b")}
    ledger = SimpleNamespace(last_record={"instance": 3, "instance:a": 5, "instance:b": 7}.__getitem__)
    assert [first_number(label, {"labels": labels}, ledger) for label in labels] == [0, 3, 8]


def test_annotations_are_one_list_though_some_samples_have_none():
    ledger = SimpleNamespace(last_record=lambda label: 4)
    run = {
        "labels": {"instance": {"classes": ["ball"]}, "pose": {"joints": [], "limbs": [], "category": 1}},
        "versions": {},
    }
    listed = AnnotationList("pose", run, ledger)
    rows = [
        Row(Request(k, "", k), {}, labels={"pose": [{"score": 0.5}] * count}) for k, count in enumerate((0, 2, 0, 1))
    ]
    written = b"".join(chunk for each in rows for chunk in listed.add([each]))
    found = json.loads(b"[" + written + b"]")
    assert [(each["id"], each["image_id"]) for each in found] == [(5, 1), (6, 1), (7, 3)]
    assert layer_with_picture("depth:b") is None and layer_with_picture("depth.b") is layer_with_picture("depth")


def test_same_samples_give_the_same_bytes(run_path, tmp_path):
    write_run(tmp_path / "again", 12)
    assert tree(run_path) == tree(tmp_path / "again")


def test_a_resumed_run_equals_an_undisturbed_one(run_path, tmp_path):
    path = tmp_path / "run"
    with RunFolder(path, document(12)) as folder:
        folder.add([rendered(k) for k in range(5)], {"batch_size": 4})
    # Killed after files were published, before their row: they are overwritten by the same bytes.
    (path / "images" / "00000005.png").write_bytes(b"half")
    (path / "images" / ".00000006.png.123.part").write_bytes(b"half")
    with RunFolder(path, document(12)) as folder:
        folder.add([rendered(k) for k in range(5, 12)], {"batch_size": 4})
        finish_run(folder)
    assert tree(path) == tree(run_path)


def test_processes_of_one_number_on_two_machines_write_beside_each_other(tmp_path):
    """Who helps with a late batch may have, in a container of its own, the number of the process it helps."""
    spec = importlib.util.spec_from_file_location("storage_of_another_machine", storage.__file__)
    other = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    path = tmp_path / "00000003.png"
    with storage.Publication([path]) as first:
        first.write(path, [b"who"])
        with other.Publication([path]) as second:
            second.write(path, [b"whole"])
            assert all(map(storage.is_temporary, tmp_path.iterdir())) and len(list(tmp_path.iterdir())) == 2
        assert path.read_bytes() == b"whole"
        first.write(path, [b"le"])
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_member", [False, True])
def test_who_opens_a_run_alone_removes_what_killed_processes_left_and_a_member_does_not(tmp_path, is_member):
    left = [storage.part_of(tmp_path / "images/00000003.png"), tmp_path / "state" / CLAIMS / "00000001"]
    kept = [storage.part_of(tmp_path / EXPORTS / "a/b"), tmp_path / "images/00000003.png", tmp_path / "mine/.a.txt"]
    for path in left + kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with RunFolder(tmp_path, document(1, 32), is_member=is_member):
        assert [path.exists() for path in left] == [is_member] * 2 and all(path.exists() for path in kept)


def test_files_hold_what_was_made(run_path):
    made, image = rendered(3), Image.open(run_path / "images" / "00000003.png")
    assert (np.array(image) == made.image).all()
    semantic = Image.open(run_path / "semantic" / "00000003.png")
    assert semantic.mode == "P" and (np.array(semantic) == made.annotations["semantic"].labels).all()
    depth = np.array(Image.open(run_path / "depth" / "00000003.png"))
    assert depth.dtype == np.uint16 and np.abs(depth / 1000 - made.annotations["depth"].metres).max() <= 0.0005 + 1e-6
    assert np.array(Image.open(run_path / "confidence" / "00000003.png")).dtype == np.uint8


def test_one_word_has_one_colour_in_all_label_maps(run_path):
    maps = [Image.open(run_path / folder / "00000003.png") for folder in ("semantic", "open_vocabulary")]
    cube = [image.getpalette()[3 * world.CLASSES.index("cube") : 3 * world.CLASSES.index("cube") + 3] for image in maps]
    assert cube[0] == cube[1]


def test_pycocotools_reads_its_own_output(run_path):
    from pycocotools import coco
    from pycocotools.cocoeval import COCOeval

    truth = coco.COCO(str(run_path / "instances.json"))
    assert len(truth.getImgIds()) == 12 and [
        category["name"] for category in truth.loadCats(truth.getCatIds())
    ] == list(world.THINGS)
    annotations = truth.loadAnns(truth.getAnnIds())
    assert all(item["area"] == truth.annToMask(item).sum() for item in annotations)
    found = truth.loadRes(
        [{name: item[name] for name in ("image_id", "category_id", "segmentation", "score")} for item in annotations]
    )
    for kind in ("segm", "bbox"):
        judge = COCOeval(truth, found, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert judge.stats[0] == pytest.approx(1)


def test_pycocotools_reads_keypoints(run_path):
    from pycocotools import coco
    from pycocotools.cocoeval import COCOeval

    truth = coco.COCO(str(run_path / "keypoints.json"))
    (person,) = truth.loadCats([world.CLASSES.index("person")])
    assert person["keypoints"] == list(world.JOINTS) and min(map(min, person["skeleton"])) == 1
    people = truth.loadAnns(truth.getAnnIds())
    found = truth.loadRes(
        [{name: item[name] for name in ("image_id", "category_id", "keypoints", "score")} for item in people]
    )
    judge = COCOeval(truth, found, "keypoints")
    judge.params.kpt_oks_sigmas = np.full(len(world.JOINTS), 0.08)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert judge.stats[0] == pytest.approx(1)


def test_samples_file_names_every_file_with_its_digest(run_path):
    lines = [json.loads(line) for line in (run_path / "samples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"{k:08d}" for k in range(12)]
    for line in lines:
        for file in line["files"].values():
            assert (
                storage.sha256_of(run_path / file["path"]) == file["sha256"]
                and (run_path / file["path"]).stat().st_size == file["bytes"]
            )


def test_index_files_hold_the_records_of_their_own_samples(run_path):
    lines = [json.loads(line) for line in (run_path / "samples.jsonl").read_text().splitlines()]
    for name, task in (("instances.json", "instance"), ("keypoints.json", "pose")):
        document = json.loads((run_path / name).read_text())
        numbers = [item["id"] for item in document["annotations"]]
        first = 1 + sum(line["labels"]["instance"] for line in lines) * (task == "pose")
        assert numbers == list(range(first, first + len(numbers)))  # from 1, as pycocotools takes 0 for no match
        owners = [item["image_id"] for item in document["annotations"]]
        assert owners == sorted(owners)
        assert [line["labels"][task] for line in lines] == [owners.count(k) for k in range(12)]
        assert all(item["iscrowd"] == 0 and item["category_id"] >= 1 for item in document["annotations"])
        assert [item["id"] for item in document["images"]] == list(range(12))
        assert all((run_path / item["file_name"]).is_file() for item in document["images"])
        assert {(item["width"], item["height"]) for item in document["images"]} == {(64, 64)}
        assert [category["name"] for category in document["categories"]] == [
            world.CLASSES[category["id"]] for category in document["categories"]
        ]
    with open_run(run_path) as run:
        made = [len(sample.instances.masks) for sample in run]
    assert made == [line["labels"]["instance"] for line in lines] and sum(made) > 12


def test_one_class_has_one_number_in_every_file(run_path):
    """run.json tells it, the maps hold it, and the two COCO files have it, so that they can be merged."""
    classes = read_document(run_path)["classes"]
    assert classes == [*world.CLASSES, "background"] and open_run(run_path).classes == tuple(classes)
    nothing = classes.index("background")  # which the semantic classes of the demo world lack
    instances, people = (json.loads((run_path / name).read_text()) for name in ("instances.json", "keypoints.json"))
    for category in (*instances["categories"], *people["categories"]):
        assert classes[category["id"]] == category["name"]
    ids = [item["id"] for item in (*instances["annotations"], *people["annotations"])]
    assert len(set(ids)) == len(ids) > len(instances["annotations"])
    with open_run(run_path) as run:
        for sample in run:
            maps = {role: np.array(Image.open(run_path / role / f"{sample.id}.png")) for role in MAPS}
            shown = maps["open_vocabulary"] != nothing
            assert (maps["open_vocabulary"][shown] == maps["semantic"][shown]).all()
            for item, mask in zip(sample.row.labels["instance"], sample.instances.masks, strict=True):
                assert (maps["semantic"][mask] == item["category_id"]).all()
            words = sample.open_vocabulary
            assert words.classes == ("background", *world.THINGS)  # the label itself knows its own classes alone
            assert (np.array(words.classes)[words.labels] == np.array(classes)[maps["open_vocabulary"]]).all()
        ints = {task: run.as_dataset(task)[3][1] for task in ("semantic", "instance", "open-vocabulary")}
    assert set(ints["instance"]["labels"].tolist()) <= set(np.unique(ints["semantic"]).tolist())
    assert words.confidence.min() == 0 and words.confidence.max() == 1
    assert (ints["open-vocabulary"] == ints["semantic"])[ints["open-vocabulary"] != nothing].all()


def test_class_numbers_begin_with_what_is_no_thing_and_fit_label_maps():
    streets = {"semantic": {"classes": ["road", "car"]}, "instance": {"classes": ["car", "rider"], "size": [4, 4]}}
    found = number_classes(streets)
    assert found["classes"] == ["road", "car", "rider"]  # those of the semantic decoder as it was taught them
    assert found["labels"]["instance"]["numbers"] == [1, 2]
    things = {"semantic": {"classes": ["car", "background"]}, "instance": streets["instance"], "pose": {"joints": []}}
    found = number_classes(things)
    assert found["classes"] == ["background", "car", "rider", "person"] and found["labels"]["pose"]["category"] == 3
    assert found["labels"]["semantic"]["numbers"] == [1, 0]
    many = [f"thing {k}" for k in range(300)]
    assert number_classes({"instance": {"classes": many}})["labels"]["instance"]["numbers"] == list(range(1, 301))
    with pytest.raises(Refused, match="show 301 classes in all, an 8-bit map holds 255"):
        number_classes({"open-vocabulary": {"classes": ["background", *many]}})
    for classes, said in (
        (["background", "car", "rider"], "classes lacks 'person'"),
        (["background", "rider", "car", "person"], "labels.instance numbers its classes otherwise"),
        (["background", "car", "car", "rider", "person"], "names a class twice"),
        ("background", "expected a list"),
    ):
        with pytest.raises(ValueError, match=said):
            check_numbers(classes, {label: found["labels"][label] for label in ("instance", "pose")})


def test_the_card_counts_what_is_there(tmp_path):
    with RunFolder(tmp_path / "run", document(5)) as folder:
        folder.add([rendered(0), rendered(1), Quarantined(Request(2, "a ball", 2), "NaN")], {})
        finish_run(folder)
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.count("2 of 5 images of 64 × 64 pixels") == 1 and "Quarantined (`NaN`): `00000002`." in card
    made = [len(rendered(k).annotations["instance"].masks) for k in range(2)]
    counts = [int(line.split("|")[3]) for line in card.split("## Instances")[1].split("\n\n")[1].splitlines()[2:]]
    assert sum(counts) == sum(made) and "`seed" not in card and card.index("## Semantic") < card.index("## Instances")


def test_card_quotes_no_foreign_markup(tmp_path):
    hostile = document(1) | {"model": {"name": "`x`\n# <script>", "source": "", "licence": "[a](b)`", "digests": {}}}
    hostile["labels"]["semantic"]["classes"][2] = "<img src=x> | [a](javascript:b)"
    hostile |= number_classes(hostile["labels"])
    with RunFolder(tmp_path / "run", hostile) as folder:
        folder.add([rendered(0)], {})
        finish_run(folder)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "<img" not in card and "](" not in card and "\n# <" not in card
    assert "- Model: `'x' # <script>`;" in card


def test_open_run_gives_back_every_label(run_path):
    run = open_run(run_path)
    assert len(run) == 12 and run["00000003"].id == run[3].id == run[-9].id
    for k in (0, 3, 11):
        there, made = run[k], rendered(k)
        assert (there.image == made.image).all() and there.prompt == made.request.prompt and there.seed == k
        assert (
            there.semantic.labels == made.annotations["semantic"].labels
        ).all() and there.semantic.classes == world.CLASSES
        assert (there.instances.masks == made.annotations["instance"].masks).all()
        assert (there.instances.class_ids == made.annotations["instance"].class_ids).all()
        assert np.abs(there.depth.metres - made.annotations["depth"].metres).max() < 0.001
        assert (there.keypoints.visibility == made.annotations["pose"].visibility).all()
        assert (there.open_vocabulary.labels == made.annotations["open-vocabulary"].labels).all()
    assert [type(label) for label in (there.semantic, there.instances, there.depth, there.keypoints)] == [
        SemanticMap,
        Instances,
        DepthMap,
        Keypoints,
    ]


@pytest.mark.parametrize("key", ["00000012", "3x", "", "9" * 30, "-1"])
def test_unknown_ids_are_key_errors(run_path, key):
    with pytest.raises(KeyError):
        open_run(run_path)[key]


def test_positions_beyond_the_end_are_index_errors(run_path):
    run = open_run(run_path)
    for position in (12, -13):
        with pytest.raises(IndexError):
            run[position]
    assert len(list(run)) == 12


def test_no_run_folder_is_refused(tmp_path):
    with pytest.raises(Refused, match="not a run folder"):
        open_run(tmp_path / "none")
    (tmp_path / "some.txt").write_text("x")
    with pytest.raises(Refused, match="not empty") as refusal:
        read_document(tmp_path)
    assert refusal.value.cause.startswith(f"{tmp_path}: the folder is not empty")
    with pytest.raises(Refused, match="not a run folder"):
        open_run(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99, "config": {}}', '{"format": 1, "config": 3}'])
def test_unreadable_descriptions_are_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(Refused, match="run.json"):
        read_document(tmp_path)


def test_images_of_a_run_have_from_one_pixel_to_4096_x_4096():
    described = document(1)
    for size, is_right in ((4096, True), (4097, False), (0, False)):
        described["sampling"]["size"] = size
        with nullcontext() if is_right else pytest.raises(ValueError, match="out of range"):
            check_document(described)
    assert sides(described, {"sides": [1, 2**24]}) == (1, 2**24)
    for wrong in ([0, 9], [4096, 4097]):
        with pytest.raises(ValueError, match="its row has the sides"):
            sides(described, {"sides": wrong})


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("config", {"image_format": "gif"}, "config.image_format is .gif., expected png or jpg"),
        ("plan", {"number": 0}, "out of range"),
        ("plan", {"number": 2**48}, "out of range"),
        ("plan", {"batch_size": 0}, "out of range"),
        ("plan", {"batch_size": 2**31}, "out of range"),
        (
            "labels",
            {"semantic": {"classes": ["ball"], "ignore": 255, "palette": "pink"}},
            "^labels.semantic: palette is",
        ),
        ("command", "train", "command is .train., expected generate"),
    ],
)
def test_a_description_that_no_command_wrote_is_refused(part, changes, told):
    described = document(1)
    check_document(described)
    with pytest.raises(ValueError, match=told):
        check_document(described | {part: described[part] | changes if isinstance(changes, dict) else changes})


@pytest.mark.parametrize("size", [0, -1, "5", None])
def test_a_size_of_shards_that_none_has_is_refused(size):
    assert shard_size({}) == SHARD_SIZE and shard_size({"shard_size": 1}) == 1
    with pytest.raises(Refused, match="run.json: shard_size is"):
        shard_size({"shard_size": size})


def test_other_configurations_are_refused_with_the_fields(tmp_path):
    with pytest.raises(Refused, match="number: 4 there, 5 asked for; seed: 0 there, 1 asked for"):
        check_same(tmp_path, document(4), {"config": document(5, seed=1)["config"]})
    with pytest.raises(Refused, match="with other settings"):  # of the run, whatever it is called
        check_same(tmp_path, {"config": {"source.run": "a"}}, {"config": {"source.run": "b"}})
    with pytest.raises(Refused, match="made of other samples"):
        check_same(tmp_path, {"source": None, "config": {}}, {"source": {"samples.jsonl": "0"}, "config": {}})
    with pytest.raises(Refused, match="with other settings .*seed: 0 there, 1 asked for"):
        check_same(tmp_path, {"source": 1, "config": {"seed": 0}}, {"source": 2, "config": {"seed": 1}})
    with pytest.raises(Refused, match="labels.depth.unit: .* there, .* asked for"):
        check_same(tmp_path, {"labels": {"depth": {"unit": "m"}}}, {"labels": {"depth": {"unit": "mm"}}})
    with pytest.raises(Refused, match="it holds a run of merge, not of generate"):
        check_config(tmp_path, document(4) | {"command": "merge"}, document(4)["config"])


def test_values_that_differ_are_told_whole_up_to_48_letters_with_their_quotes():
    (line,) = differences({"note": "a" * 46}, {"note": "b" * 47})
    assert line == f'note: "{"a" * 46}" there, "{"b" * 44}... asked for'


def test_two_writers_are_refused(tmp_path):
    with RunFolder(tmp_path / "run", document(1)), pytest.raises(Refused, match="another process"):
        RunFolder(tmp_path / "run", document(1))


def test_a_run_that_another_process_begins_or_lets_grow_meanwhile_stays_as_it_is(tmp_path):
    for number in (2, 4, 4):
        with RunFolder(tmp_path, document(number)):
            pass
    before = (tmp_path / "run.json").read_bytes()
    changed = document(4)
    others = [
        {**changed, part: changed[part] | {"batch_size": 99}} for part in ("plan", "engine")
    ]  # as if first starts
    for other in (document(2), document(8, seed=1), document(4, seed=1), *others):
        with pytest.raises(Refused, match="another process has changed the run meanwhile"):
            RunFolder(tmp_path, other)
    assert (tmp_path / "run.json").read_bytes() == before
    with Ledger(tmp_path / "state" / "ledger.sqlite", read_only=True) as ledger:
        assert json.loads(ledger.read_note("run")) == json.loads(before)


@pytest.mark.parametrize("is_released", [True, False])
def test_a_folder_is_shared_once_who_holds_it_alone_has_let_go(tmp_path, monkeypatch, is_released):
    (tmp_path / "state").mkdir()
    held, seconds = ExitStack(), iter(range(0, 10**6, 10 if is_released else 100))
    held.enter_context(storage.hold_lock(tmp_path / LOCK))
    sleep = held.close if is_released else lambda: None
    clock = SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: sleep())
    monkeypatch.setattr(storage, "time", clock)
    with held, nullcontext() if is_released else pytest.raises(Refused, match="another process"):
        with run_folder.share_folder(tmp_path):
            pass


def test_the_first_of_those_who_share_a_folder_cleans_it(tmp_path, monkeypatch):
    (tmp_path / "state").mkdir()
    cleaned: list[Path] = []
    monkeypatch.setattr(run_folder, "clean", cleaned.append)
    with run_folder.share_folder(tmp_path), run_folder.share_folder(tmp_path):
        assert cleaned == [tmp_path]


def test_set_aside_samples_have_a_row_and_no_file(tmp_path):
    with RunFolder(tmp_path / "run", document(2)) as folder:
        folder.add([rendered(0), Quarantined(Request(1, "a ball", 1), "NaN")], {})
        finish_run(folder)
        assert folder.ledger.indices() == [0] and folder.ledger.indices("set-aside") == [1]
    assert (
        len(list((tmp_path / "run" / "images").iterdir())) == 1
        and "`00000001`" in (tmp_path / "run" / "README.md").read_text()
    )


def test_renewing_mends_files_and_never_writes_other_bytes(tmp_path):
    write_run(tmp_path / "run", 2)
    before = tree(tmp_path / "run")
    (tmp_path / "run" / "depth" / "00000001.png").write_bytes(b"damaged")
    (tmp_path / "run" / "images" / "00000001.png").unlink()
    with RunFolder(tmp_path / "run", document(2)) as folder:
        row = folder.ledger.row(1)
        assert folder.renew(row, rendered(1)) == ["depth/00000001.png", "images/00000001.png"]
        assert folder.renew(row, rendered(1)) == []
        with pytest.raises(GateFailed, match="differs from the run folder in labels in the ledger; nothing was"):
            folder.renew(replace(row, labels=row.labels | {"depth": {"min": 0.0}}), rendered(1))
        with pytest.raises(GateFailed, match="differs .* in depth/00000001.png"):
            folder.renew(
                row,
                rendered(2, prompt=row.request.prompt).__class__(
                    row.request, rendered(2).image, rendered(2).annotations
                ),
            )
    assert tree(tmp_path / "run") == before


def test_index_files_are_rebuilt_from_the_ledger(tmp_path):
    write_run(tmp_path / "run", 3)
    before = tree(tmp_path / "run")
    for name in ("samples.jsonl", "instances.json", "keypoints.json", "README.md", "gallery/index.html"):
        (tmp_path / "run" / name).unlink()
    with RunFolder(tmp_path / "run", document(3)) as folder:
        assert not run_folder.is_indexed(folder.path, folder.document, folder.ledger)
        finish_run(folder)
        assert run_folder.is_indexed(folder.path, folder.document, folder.ledger)
    assert tree(tmp_path / "run") == before


def test_jpeg_and_other_tasks_only(tmp_path):
    sample = rendered(0)
    files, records = label_files.encode(
        sample.__class__(sample.request, sample.image, {"depth": sample.annotations["depth"]}),
        "jpg",
        document(1)["labels"],
    )
    assert (
        sorted(files) == ["depth", "image"]
        and files["image"][0] == "images/00000000.jpg"
        and files["image"][1][:2] == b"\xff\xd8"
    )
    assert sorted(records) == ["depth"]


def test_a_run_that_was_closed_opens_its_ledger_anew(run_path):
    with open_run(run_path) as run:
        ledger = run.ledger
        assert run.ledger is ledger
    assert run.ledger is not ledger and len(run) > 0
    for _ in range(2):
        run.close()
    with pytest.raises(Exception, match="closed"):
        ledger.count()


def test_run_is_a_torch_data_set(run_path):
    import torch

    run = open_run(run_path)
    batch, labels = next(iter(torch.utils.data.DataLoader(run.as_dataset("semantic"), batch_size=4)))
    assert (
        batch.shape == (4, 3, 64, 64)
        and batch.dtype == torch.float32
        and labels.dtype == torch.int64
        and labels.shape == (4, 64, 64)
    )
    assert torch.equal(batch[0], torch.from_numpy(run[0].image).permute(2, 0, 1) / 255)
    assert run.as_dataset("depth")[0][1].dtype == torch.float32
    assert run.as_dataset("instance")[3][1]["masks"].dtype == torch.bool and run.as_dataset("pose")[3][1][
        "keypoints"
    ].shape[1:] == (len(world.JOINTS), 3)
    assert len(list(torch.utils.data.DataLoader(run.as_dataset("depth"), num_workers=2))) == 12
    with pytest.raises(Refused, match="no labels for"):
        run.as_dataset("colour")
    for wrong in (None, 3, iter(["depth"])):  # an iterator would have been at its end when the labels are read
        with pytest.raises(Refused, match="task: .* was given, expected a label or several labels"):
            run.as_dataset(wrong)
    part = run.as_dataset("depth")[3:5]
    assert len(part) == 2 and torch.equal(part[1][1], run.as_dataset("depth")[4][1])
    # Lightning's LightningDataModule.from_datasets makes loaders of nothing else
    assert isinstance(part, torch.utils.data.Dataset) and len(part + part) == 4
    assert set(run.tasks) == set(TASKS)


def test_a_fork_leaves_a_ledger_open_to_its_parent(tmp_path, monkeypatch):
    database = sqlite.Database(tmp_path / "ledger", tmp_path / "ledger")
    with monkeypatch.context() as fork:
        fork.setattr(os, "getpid", lambda: -1)
        database.__del__()
    assert database.execute("SELECT 1") == [(1,)]
    database.close()


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are listed in /proc")
def test_a_run_that_nobody_reads_any_more_is_closed(tmp_path):
    """Without a collection, before which files and SQLite's caches of two megabytes each would add up."""
    write_run(tmp_path / "run", 2, 32)
    gc.disable()
    try:
        counts = []
        for _ in range(3):
            run = open_run(tmp_path / "run")
            assert run[:1][0].prompt == run[0].prompt
            del run
            counts.append(len(os.listdir("/proc/self/fd")))
    finally:
        gc.enable()
    assert counts[0] == counts[2]


def test_a_data_set_gives_several_labels_together_and_batches_things(run_path):
    import torch

    run = open_run(run_path)
    pairs = run.as_dataset(("semantic", "depth", "instance"), transform=lambda image, label: (image[:, ::2], label))
    images, labels = next(iter(torch.utils.data.DataLoader(pairs, batch_size=4, collate_fn=pairs.collate)))
    assert images.shape == (4, 3, 32, 64) and labels["semantic"].shape == labels["depth"].shape == (4, 64, 64)
    for sample, found in zip(run, labels["instance"]):
        assert found["boxes"].shape == (len(sample.instances.masks), 4) and found["boxes"].dtype == torch.float32
        for mask, (left, top, right, bottom) in zip(sample.instances.masks, found["boxes"].int().tolist()):
            assert mask[top:bottom, left:right].sum() == mask.sum() and mask[top:bottom, left].any()
    with pytest.raises(Refused, match="no labels for 'colour'"):
        run.as_dataset(("semantic", "colour"))
    with pytest.raises(Refused, match=r"'semantc', it has .*did you mean semantic\?"):
        run.as_dataset("semantc")
    with pytest.raises(Refused, match="not a run in shards, which streaming reads"):
        run.as_dataset("depth", streaming=True)


def test_a_run_is_sliced_and_asked_for_what_passes(run_path):
    run = open_run(run_path)
    assert [sample.id for sample in run[2:5]] == ["00000002", "00000003", "00000004"] and len(run[8:][:2]) == 2
    assert [sample.id for sample in run[1:6:2]] == ["00000001", "00000003", "00000005"]
    with pytest.raises(Refused, match="one order"):
        run[::-1]
    assert [sample.id for sample in reversed(run[2:4])] == ["00000003", "00000002"]
    assert run[-1].id == run["00000011"].id == "00000011" and repr(run[:2]).endswith(f"{', '.join(run.tasks)}>")
    assert "00000011" in run and "11" in run and run[-1] in run
    assert "00000011" not in run[:2] and run[-1] not in run[:2] and "00000012" not in run and 11 not in run
    assert replace(run[-1], folder=run_path.parent) not in run  # of another run
    balls = run.where(classes=("ball",))
    assert 0 < len(balls) < len(run) and all("ball" in sample.classes for sample in balls)
    assert len(run.where(classes=iter(["ball"]))) == len(balls)
    either = [sample.id for sample in run if {"ball", "cube"} & {*sample.classes}]
    assert [sample.id for sample in run.where(classes=("ball", "cube"))] == either and len(either) > len(balls)
    assert run[0].label("attention") is None is run[0].label("depth:other")
    with pytest.raises(Refused, match=r"'semantc' is no label \(did you mean semantic\?\)"):
        run[0].label("semantc")
    with mock.patch.object(StoredSample, "trust", property(lambda each: Trust(reasons=("x",) * (each.seed % 3)))):
        assert run.where(trusted=True).indices == tuple(range(0, 12, 3))
        assert {*run.where(trusted=False).indices} == {*run.indices} - {0, 3, 6, 9}
    assert [sample.id for sample in run.where(test=lambda sample: sample.seed % 2)][:2] == ["00000001", "00000003"]
    with pytest.raises(Refused, match="have no scores yet") as refused:
        run.where("sharpness > 3")
    assert refused.value.remedy == f"Score them first: python -m datasetdm_fast.filter {run_path}"
    with pytest.raises(Refused, match="did you mean score"):
        run.where("scroe > 3")
    with pytest.raises(Refused, match=r"searched for .bal. \(did you mean ball\?\)"):
        run.where(classes=("bal",))
    with pytest.raises(Refused, match="searched for 'background'"):  # a class of maps, no word of prompts
        run.where(classes=("background",))
    with pytest.raises(Refused, match="'ball' is one string, expected a sequence of words"):
        run.where(classes="ball")
    assert "<img" in run[0]._repr_html_() and len(repr(run[0])) < 400


def test_a_notebook_shows_a_class_in_one_colour_and_only_the_beginning_of_a_long_prompt(tmp_path):
    write_run(tmp_path, 2, 160, ["a ball " * 100] * 2)
    sample = open_run(tmp_path)[1]  # two balls
    text = sample._repr_html_()
    shown = re.findall(r'base64,([^"]*)" alt="[^"]*"><figcaption>([^<]*)<', text)
    pictures = {name: np.array(Image.open(io.BytesIO(base64.b64decode(data))), int) for data, name in shown}
    ball = np.argwhere(sample.semantic.labels == sample.semantic.classes.index("ball")).mean(0).astype(int)
    colours = [pictures[task][tuple(ball)] for task in ("semantic", "open-vocabulary")]
    assert np.abs(colours[0] - colours[1]).max() < 12 < np.ptp(colours[0])  # JPEG
    (line,) = (name for name in pictures if name.startswith(sample.id))
    assert len(line) == 90 and line.endswith("…") and f'title="{sample.id}: {"a ball " * 100}"' in text


def test_a_copy_whose_last_change_the_disk_did_not_take_is_not_used(tmp_path, monkeypatch):
    begin = sqlite.Database.__init__

    def left_behind(database, path, address, *settings, **options):
        if "schema_version" in "".join(settings):
            address.with_name(f"{address.name}-journal").write_bytes(b"of a change that was not finished")
        begin(database, path, address, **options)

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.note("a", "b")
        with monkeypatch.context() as patch:
            patch.setattr(sqlite.Database, "__init__", left_behind)
            with pytest.raises(Missing, match="ledger.sqlite: Input/output error"):
                ledger.settle()
        assert ledger.settle() and ledger.read_note("a") == "b"


LONG_RECIPE = {"batch_size": 4, "model": {f"part {k}": "ab" * 32 for k in range(16)}}


def test_digests_and_trust_are_short(tmp_path):
    digest, trust = "0123456789abcdef" * 4, Trust(confidence=0.9)
    files = {"depth": RowFile("depth/00000001.png", StoredFile(digest, 5))}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        far = Trust(("ball",), ("cube", "cone"), 0.25, 0.5, ("no ball", "far"), 1.5)
        for given in (trust, Trust(), Trust(missing=("ball",), reasons=("no ball",)), far, Trust(domain=0.0), None):
            ledger.commit([Row(Request(1, "a ball", 1), {}, files, trust=given)])
            assert ledger.row(1).trust == given and ledger.row(1).files == files
            assert ledger.count_trust()[0] == (given is not None and not given.is_trusted)
        ledger.commit([Row(Request(1, "a ball", 1), {}, files, trust=trust)])
        assert ledger._database.execute("SELECT length(files), length(trust) FROM samples") == [(59, 36)]
        for wrong in ({"confidence": "sure"}, {"domain": "far"}, {"confidence": [0.5]}, {"reasons": "none"}):
            with pytest.raises(ValueError):
                decode_trust({"disagreeing": 0.0, **wrong})
        ledger.commit([Row(Request(1, "a ball", 1), {}, tracings={"instance": ["M0 0"] * 99})])
        assert ledger._database.execute("SELECT length(tracings) FROM tracings") < [(60,)]
        bomb = zlib.compress(b'{"instance":["' + b"M" * 2**24 + b'"]}')
        for damaged in (bomb, bomb[:99], b"no zlib"):
            ledger._database.execute("UPDATE tracings SET tracings = ?", (damaged,))
            with pytest.raises(Refused, match="the row of sample 1 is damaged"):
                list(ledger.rows(parts=("tracings",)))
        for damaged in (["AAAA", 5], ["x" * 40, 5], [7, 5], ["A" * 43, "5"], ["A" * 43, -5]):
            ledger._database.execute("UPDATE samples SET files = ?", (json.dumps({"depth": damaged}),))
            with pytest.raises(Refused, match="the row of sample 1 is damaged"):
                print(ledger.row(1).files)


def test_a_recipe_is_stored_once_and_rows_are_small(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        files = {role: RowFile(f"{role}/00000001.png", StoredFile("ab" * 32, 5)) for role in ("depth", "semantic")}
        files["image"] = RowFile("images/00000001.jpg", StoredFile("cd" * 32, 5))
        rows = [Row(Request(k, "a ball", k), LONG_RECIPE, files, {}, tracings={"instance": ["M0 0"]}) for k in (1,)]
        ledger.commit(rows)
        ledger.commit([row(k) for k in range(2, 50)])
        ledger.commit([Row(Request(k, "a ball", k, (), f"no {k % 2}"), LONG_RECIPE) for k in range(50, 100)])
        assert [row.request.negative for row in ledger.rows(parts=())][-2:] == ["no 0", "no 1"]
        assert ledger.row(50).recipe == ledger.row(1).recipe == LONG_RECIPE and ledger.row(1).files == files
        assert list(ledger.rows(parts=("tracings",)))[0] == Row(rows[0].request, LONG_RECIPE, tracings=rows[0].tracings)
        ((written,),) = ledger._database.execute("SELECT sum(length(recipe)) FROM samples")
        assert written < 100 * 80 and ledger._database.execute("SELECT count(*) FROM recipes") == [(1,)]
        ledger._database.execute("UPDATE recipes SET recipe = '{}'")
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        with pytest.raises(Refused, match="the row of sample 1 is damaged .*no recipe has the digest"):
            ledger.row(1)


def test_counts_of_a_run_are_read_before_and_while_it_is_made(tmp_path):
    """As by a process whose peers still work on it, and for the line of progress."""
    assert writing.count_outside(tmp_path) == 0
    assert (writing.read_result(tmp_path, 3, 0, 0.0).done, writing.close_folder(tmp_path, 3, 0, 0.0).done) == (0, 0)
    with RunFolder(tmp_path, document(3, 32)) as folder:
        folder.add([replace(rendered(k, 32), trust=Trust(domain=0.5 + k)) for k in range(2)], {})
        found = writing.read_result(tmp_path, 3, 1, 0.0)
        assert (found.number, found.done, found.made, found.is_complete) == (3, 2, 1, False)
        assert writing.count_outside(tmp_path) == found.outside == 1


def test_a_label_that_a_sample_lacks_is_no_tensor(run_path):
    pair = open_run(run_path).as_dataset("depth")
    lacking = replace(pair, task="attention")
    with pytest.raises(Refused, match="sample 00000001 has no label 'attention'"):
        lacking[1]


def test_more_recipes_than_are_cached_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("datasetdm_fast.runs.run_folder.ledger.CACHED_RECIPES", 2)
    recipes = [{**LONG_RECIPE, "steps": steps} for steps in (10, 20, 30)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.commit([Row(Request(k, "a ball", k), recipes[k]) for k in range(3)])
        for k in (0, 1, 2, 0, 2):
            assert ledger.row(k).recipe == recipes[k] and len(ledger._recipes) <= 2


def test_a_disk_without_room_beside_a_ledger_is_full_and_the_ledger_not_damaged(tmp_path, monkeypatch):
    write_run(tmp_path / "run", 1, 32)
    real = storage.syscall

    def full(name, call, *arguments):
        if name.startswith("sqlite SELECT"):
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
            raise error
        return real(name, call, *arguments)

    monkeypatch.setattr(storage, "syscall", full)
    for read in (lambda: audit(tmp_path / "run"), lambda: open_run(tmp_path / "run")):
        with pytest.raises(Missing, match="the disk is full"):
            read()


def test_a_limit_of_the_size_of_files_is_named(tmp_path):
    code = f"""
import resource
from pathlib import Path
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.sqlite import Database
from datasetdm_fast.errors import Missing

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
path = Path({str(tmp_path)!r})
for write in (
    lambda: Database(path / "a", path / "a").execute("CREATE TABLE t AS SELECT randomblob(99999)"),
    lambda: storage.publish({{path / "b": bytes(30_000)}}),
):
    try:
        write()
    except Missing as refusal:
        print(refusal.cause)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.count("the file may not grow any more (ulimit -f") == 2


@pytest.mark.parametrize(
    ("code", "limit", "kind", "said"),
    [
        (sqlite3.SQLITE_IOERR_WRITE, 20_000, Missing, "the file may not grow any more"),
        (sqlite3.SQLITE_IOERR_WRITE, sqlite.resource.RLIM_INFINITY, Missing, "odd"),
        (sqlite3.SQLITE_BUSY, 20_000, Missing, "another process has locked it (odd)"),
        (sqlite3.SQLITE_LOCKED, 20_000, Missing, "another process has locked it (odd)"),
        (sqlite3.SQLITE_CORRUPT, 20_000, Refused, "not a readable ledger (odd)"),
    ],
)
def test_an_error_of_a_database_is_told_by_its_code(code, limit, kind, said, tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite.resource, "getrlimit", lambda _: (limit, limit))
    error = sqlite3.OperationalError("odd")
    error.sqlite_errorcode = code
    refusal = sqlite._as_refusal(error, tmp_path)
    assert type(refusal) is kind and refusal.cause.startswith(f"{tmp_path}: {said}")


def test_a_database_that_cannot_be_begun_leaves_nothing_behind(tmp_path):
    with pytest.raises(Refused, match="not a readable ledger"):
        sqlite.connect(tmp_path / "x.sqlite", "CREATE NONSENSE")
    assert list(tmp_path.iterdir()) == []


def failing(monkeypatch, name: str, code: int) -> None:
    """Lets one kind of access to the disk fail."""
    syscall = storage.syscall

    def fail(called, call, *arguments):
        if called == name:
            raise OSError(code, os.strerror(code))
        return syscall(called, call, *arguments)

    monkeypatch.setattr(storage, "syscall", fail)


def test_errors_of_the_disk_are_refusals_about_the_path(tmp_path, monkeypatch):
    (source := tmp_path / "source").write_bytes(b"x")
    path, half = tmp_path / "to" / "path", tmp_path / ".x.1.part"
    half.write_bytes(b"x")
    for name, code, act, said in (
        ("write", errno.EFBIG, lambda: storage.create(path, b"x"), "the file may not grow any more"),
        ("link", errno.EIO, lambda: storage.create(path, b"x"), os.strerror(errno.EIO)),
        ("link", errno.EPERM, lambda: storage.create(path, b"x"), "has no hard links"),
        ("link", errno.ENOSYS, lambda: storage.create(path, b"x"), "has no hard links"),
        ("open", errno.EPERM, lambda: storage.create(path, b"x"), f"path: {os.strerror(errno.EPERM)}"),
        ("link", errno.EIO, lambda: storage.link(source, path), os.strerror(errno.EIO)),
        ("unlink", errno.EACCES, lambda: storage.remove_temporaries(tmp_path), os.strerror(errno.EACCES)),
    ):
        with monkeypatch.context() as patch, pytest.raises(Missing, match=said):
            failing(patch, name, code)
            act()
    for code in (errno.EXDEV, errno.EPERM, errno.ENOSYS):  # another disk, FAT, and a mounted store
        with monkeypatch.context() as patch:
            failing(patch, "link", code)
            assert not storage.link(source, path)
    monkeypatch.setattr(os, "write", lambda handle, data: 0)
    with pytest.raises(Missing, match="the disk took no byte|Input/output error"):
        storage.create(path, b"x")
    assert not path.exists()


def test_a_file_is_created_once_though_the_answer_is_lost(tmp_path, monkeypatch):
    link = os.link

    def link_twice(source, path):  # as NFS does where the first answer is lost
        link(source, path)
        link(source, path)

    monkeypatch.setattr(os, "link", link_twice)
    assert storage.create(tmp_path / "claim", b"mine") and (tmp_path / "claim").read_bytes() == b"mine"
    monkeypatch.undo()
    assert not storage.create(tmp_path / "claim", b"other") and (tmp_path / "claim").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]


def test_what_only_closing_a_file_reports_is_a_refusal(tmp_path, monkeypatch):
    close = os.close

    def fail(handle):
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        close(handle)
        if not is_folder:
            failing_call(errno.EIO)

    monkeypatch.setattr(os, "close", fail)
    with pytest.raises(Missing, match=f"one: {os.strerror(errno.EIO)}|two: {os.strerror(errno.EIO)}"):
        storage.publish({tmp_path / "one": b"1", tmp_path / "two": b"2"})


@pytest.mark.parametrize(("code", "remedy"), [(errno.EMFILE, "ulimit -n"), (errno.EACCES, "permissions")])
def test_the_remedy_is_that_of_the_error(tmp_path, monkeypatch, code, remedy):
    failing(monkeypatch, "open", code)
    with pytest.raises(Missing) as caught:
        storage.publish({tmp_path / "x": b"x"})
    assert remedy in caught.value.remedy and os.strerror(code) in caught.value.cause


def failing_call(code: int):
    raise OSError(code, os.strerror(code))


def test_file_systems_that_sync_no_folders_hold_runs(tmp_path, monkeypatch):
    real = os.fsync

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            failing_call(code)
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    path, code = tmp_path / "to" / "path", errno.EINVAL
    assert storage.create(path, b"x") and path.read_bytes() == b"x"
    storage.publish({path: b"y"})
    assert path.read_bytes() == b"y"
    code = errno.EIO
    with pytest.raises(Missing, match=os.strerror(errno.EIO)):
        storage.make_folder(tmp_path / "other")
    monkeypatch.setattr(os, "fsync", lambda handle: failing_call(errno.EINVAL))
    with pytest.raises(Missing, match=os.strerror(errno.EINVAL)):  # of a file it is an error
        storage.move(path, tmp_path / "moved")


def test_a_name_with_a_nul_byte_is_of_no_file(tmp_path):
    with pytest.raises(Refused, match="cannot be read, no file has such a name"):
        storage.read(tmp_path / "a\0b", 5)


def test_names_are_compared_only_where_a_folder_has_few(tmp_path, monkeypatch):
    for name in ("masks", "other"):
        (tmp_path / name).mkdir()
    for most, told in ((2, " (did you mean masks?)"), (1, "")):
        monkeypatch.setattr(storage, "MOST_COMPARED", most)
        assert storage.named_alike(tmp_path / "mask") == told


def test_a_process_of_somebody_else_is_alive(monkeypatch):
    for error, is_alive in ((None, True), (PermissionError(), True), (ProcessLookupError(), False)):
        monkeypatch.setattr(os, "kill", mock.Mock(side_effect=error))
        assert storage.is_alive(7) is is_alive


def test_a_run_that_another_process_begins_between_two_looks_is_a_new_one(tmp_path, monkeypatch):
    real = Path.iterdir

    def look(folder):
        (folder / "run.json").touch()
        (folder / "images").mkdir()
        return real(folder)

    monkeypatch.setattr(Path, "iterdir", look)
    assert read_document(tmp_path) is None  # which is read again once the folder is held


def test_what_a_run_has_made_counts_whatever_became_of_it(tmp_path):
    assert count_rows(tmp_path / "run") == 0
    with RunFolder(tmp_path / "run", document(5)) as folder:
        folder.add([rendered(0), rendered(1), Quarantined(Request(2, "a ball", 2), "NaN")], {})
        folder.drop([1])
        assert folder.ledger.indices_between(0, 5) == {0, 1, 2}
    assert count_rows(tmp_path / "run") == 3


def test_a_line_of_a_sample_has_the_texts_and_the_picture_that_it_was_made_with():
    texts = {"negative": "fog", "class_prompt": "a ball"}
    facts = {"picture": "a.png", "source": "00000003", "steps": 4}
    for request, recipe in ((Request(0, "a ball", 7, **texts), facts), (Request(0, "a ball", 7), {"steps": 4})):
        row = SimpleNamespace(request=request, files={}, labels={}, trust=None, recipe=recipe)
        (line,) = map(json.loads, Lines.add(None, [row]))
        expected = texts | {"picture": "a.png", "source": "00000003"} if recipe is facts else {}
        usual = {"id", "prompt", "seed", "classes", "files", "labels"}
        assert {name: value for name, value in line.items() if name not in usual} == expected
