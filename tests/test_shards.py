"""Runs in shards: the bytes of a shard follow from the settings and its number alone, whatever happens to the processes
that make it, and readers find in it what a run folder has.
"""

import gc
import io
import json
import pickle
import random
import shutil
import sys
import tarfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchless
import troubled
from PIL import Image
from skips import IS_LONG
from test_ranks import tree

import datasetdm_fast
from datasetdm_fast import audit, convert, drop, gallery, generate, merge, restore, split, vary
from datasetdm_fast import filter as filtering
from datasetdm_fast.command_line import sharded_run
from datasetdm_fast.command_line.run_settings import complete_settings, read_spec
from datasetdm_fast.data import Quarantined, Request, Sample, Trust
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.engine.loop.prompts import TURN
from datasetdm_fast.errors import GateFailed, Missing, Refused, Unanswered
from datasetdm_fast.runs.curation import dropping
from datasetdm_fast.runs.curation import filtering as curation
from datasetdm_fast.runs.exporting import conversion
from datasetdm_fast.runs.gallery import showing
from datasetdm_fast.runs.jobs import job as job_module
from datasetdm_fast.runs.jobs.job import build_job
from datasetdm_fast.runs.run_folder.audit import audit_place
from datasetdm_fast.runs.run_folder.corrections import CORRECTIONS, Correction, format_corrections, read_corrections
from datasetdm_fast.runs.run_folder.document import pretty
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, QUARANTINED, Row, RowFile
from datasetdm_fast.runs.run_folder.reader import fetch_state
from datasetdm_fast.runs.run_folder.scores import read_scores
from datasetdm_fast.runs.run_folder.selections import ShardScores
from datasetdm_fast.runs.run_folder.shard_places import ShardBucket, ShardFolder, shard_place
from datasetdm_fast.runs.run_folder.shard_stream import ShardStream
from datasetdm_fast.runs.run_folder.shards import (
    RECORD,
    ShardEntry,
    ShardIndex,
    ShardLedger,
    count_classes,
    encode_index,
    entry_name,
    index_name,
    tar_name,
    write_tar,
)
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.runs.workers import claims, shard_worker, spawn
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.shard_worker import ShardRank, work_on_shards
from datasetdm_fast.runs.workers.worker import Callbacks
from datasetdm_fast.training.readers import open_data
from datasetdm_fast.training.readers.run import RunSamples

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
SAMPLES, SIZE, BATCH = 26, 5, 2  # six shards, the last of one sample; no batch fits five samples
ALONE = ShardRank()
LINE = f"--layout shards --shard-size {SIZE} --number {SAMPLES} --batch-size {BATCH} --quiet".split()


def describe(job):
    return []


def spec_of(out, **changes):
    config = RunConfig(out=str(out), layout="shards", shard_size=SIZE, number=SAMPLES, batch_size=BATCH, quiet=True)
    return replace(read_spec(replace(config, **changes)), may_mix=False)


def make(out, place=None, rank=ALONE, number=SAMPLES, seed=0, **options):
    spec = spec_of(out, number=number, seed=seed)
    return work_on_shards(spec, place or shard_place(out), rank, Callbacks(describe, **options))


@pytest.fixture(scope="module", autouse=True)
def arithmetic():
    with pytest.MonkeyPatch.context() as patch:
        torchless.install(patch.setattr)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a single process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    make(out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same samples in a run folder."""
    out = tmp_path_factory.mktemp("folder") / "run"
    assert generate.main(["--number", str(SAMPLES), "--batch-size", "1", "--quiet", "--out", str(out)]) == 0
    return out


@pytest.fixture
def bucket(monkeypatch):
    import fsspec

    monkeypatch.setattr(ShardBucket, "_protocols", ("bucket",))
    files = fsspec.filesystem("memory")
    files.makedirs("/bucket", exist_ok=True)
    yield ShardBucket("memory://bucket/run")
    files.rm("/bucket", recursive=True)


def contents(place):
    return {
        f"{part}/{name}": place.read(f"{part}/{name}") for part in ("manifest", "shards") for name in place.names(part)
    }


def test_samples_that_no_shard_has_have_no_row(alone):
    ledger = ShardLedger(shard_place(alone))
    assert ledger.row(SAMPLES - 1).request.index == SAMPLES - 1
    assert ledger.row(SAMPLES) is ledger.row(SAMPLES, parts=("files",)) is ledger.row(10 * SAMPLES) is None


def test_the_index_of_a_shard_gives_back_its_rows_and_how_many_things_each_shows():
    request = Request(7, "two balls", 2**40, ("ball",), "fog", "balls")
    files = {"image": RowFile("images/00000007.png", StoredFile("ab" * 32, 30))}
    trust = Trust(("cube",), reasons=("cube is in the prompt",))
    rows = [
        Row(request, {"steps": 2}, files, {}, DOUBTFUL, "doubtful", trust),
        Row(Request(8, "a cube", 0), {"steps": 3}, {"image": RowFile("images/00000008.png", StoredFile("cd" * 32, 9))}),
    ]
    places = [{"image": (512, 30), RECORD: (1024, 60)}, {"image": (2048, 9), RECORD: (3072, 5)}]
    content = encode_index(rows, places, [Counter(ball=2, cone=1), Counter()])
    index = ShardIndex.decode(content)
    assert [index.rows[7], index.rows[8]] == rows and [index.places[7], index.places[8]] == places
    counts = parquet.read_table(io.BytesIO(content)).column("class_counts").to_pylist()
    assert counts == [[{"class": "ball", "count": 2}, {"class": "cone", "count": 1}], []]


def test_no_thread_of_arrow_holds_an_index_once_it_is_read(alone):
    """A thread that let go of it as the interpreter ended would end the command with an abort."""
    content = (alone / index_name(0)).read_bytes()
    ShardIndex.decode(content)
    held = sys.getrefcount(content)
    for _ in range(50):
        ShardIndex.decode(content)
        assert sys.getrefcount(content) == held


def test_a_shard_of_a_merged_run_has_all_its_indices_moved():
    entry = ShardEntry(5, 8, 0, 0, 0, {"NaN": [5, 7]}, {}, {})
    moved = entry.renumber(20, {"place": "run", "shard": 1})
    assert (moved.first, moved.stop, moved.quarantined, list(moved.indices)) == (20, 23, {"NaN": [20, 22]}, [21])


def test_quarantined_and_dropped_samples_are_none_of_those_that_a_run_counts(alone):
    for dropped, done in ((frozenset(), [5, 7, 8, 9]), (frozenset({9}), [5, 7, 8])):
        ledger = ShardLedger(shard_place(alone), shards=[1], dropped=dropped)
        ledger.entries[1] = replace(ledger.entries[1], quarantined={"NaN": [6]})
        assert ledger.indices() == done
        assert (ledger.count(), ledger.count(QUARANTINED)) == (len(done), 1)


def test_what_a_store_lists_as_a_folder_itself_is_no_name_in_it(bucket, monkeypatch):
    root = f"{bucket.root}/shards"
    monkeypatch.setattr(bucket.files, "ls", lambda path, detail: [f"{root}/", f"{root}/b.tar", root, f"{root}/a/"])
    assert bucket.names("shards") == ["a", "b.tar"]


def test_a_shard_holds_what_webdataset_reads(alone):
    assert sorted(tree(alone)) == sorted(
        ["run.json", *(name(k) for name in (entry_name, tar_name, index_name) for k in range(6))]
    )
    with tarfile.open(alone / tar_name(1)) as tar:
        names = tar.getnames()
        record = json.load(tar.extractfile("00000007.json"))
    assert {name.partition(".")[2] for name in names} == {*"png depth.png semantic.png confidence.png json".split()}
    assert record["seed"] == 7 and record["id"] == "00000007" and {"instance", "pose"} <= record["labels"].keys()


def test_mosaicml_streaming_takes_the_samples_of_shards(alone, tmp_path):
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed")
    with streaming.MDSWriter(out=str(tmp_path / "mds"), columns={"image": "png", "record": "json"}) as writer:
        for name in ShardFolder(alone).names("shards"):
            with tarfile.open(alone / "shards" / name) if name.endswith(".tar") else nullcontext(()) as tar:
                files = {member.name: tar.extractfile(member).read() for member in tar}
            for record in [name for name in files if name.endswith(".json")]:
                image = Image.open(io.BytesIO(files[record.replace(".json", ".png")]))
                writer.write({"image": image, "record": json.loads(files[record])})
    stream = streaming.StreamingDataset(local=str(tmp_path / "mds"), batch_size=2, shuffle=False)
    for sample, read in zip(datasetdm_fast.open_run(alone), stream, strict=True):
        assert read["record"]["prompt"] == sample.prompt and (np.asarray(read["image"]) == sample.image).all()


@pytest.mark.parametrize(
    ("side", "batch", "size", "told"),
    [
        # a sample of 1024 pixels and four labels: 1024 * 1024 * (3 + 2 + 0.5 + 3 + 0) + 6 * 8192 = 8,962,048 bytes
        (1024, 1, 28, "4 shards of 28 samples, at most 251 MB each"),
        (1024, 8, 24, "5 shards of 24 samples, at most 215 MB each"),
        (512, 8, 112, "1 shard of 112 samples, at most 255 MB each"),  # 2,277,376 bytes
        (128, 8, 1000, "1 shard of 1000 samples, at most 188 MB each"),  # 188,416 bytes
    ],
)
def test_a_shard_has_1000_samples_or_256_mb_by_default(tmp_path, monkeypatch, capsys, side, batch, size, told):
    monkeypatch.setattr(torchless, "SIDE", side)
    line = ["--layout", "shards", "--number", "100", "--batch-size", str(batch), "--out", str(tmp_path / "run")]
    assert generate.main([*line, "--dry-run"]) == 0 and told in capsys.readouterr().err
    spec = read_spec(RunConfig(out=str(tmp_path), layout="shards", number=100, batch_size=batch))
    assert build_job(spec, None).document["config"]["shard_size"] == size
    assert generate.main([*line, "--shard-size", "50", "--dry-run"]) == 0
    assert "2 shards of 50 samples" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_batch_or_a_sample_that_is_too_large_for_a_shard():
    assert job_module.default_shard_size(8_962_048, 50) == 28 and job_module.default_shard_size(10**9, 4) == 1


def test_files_take_no_more_than_was_reckoned(monkeypatch):
    monkeypatch.setattr(torchless, "SIDE", 256)
    sample, dice = torchless.drawn(Request(0, "a ball", 0), RunConfig.task), np.random.default_rng(0)
    side, labels = torchless.SIDE, sample.annotations
    labels["semantic"] = replace(
        labels["semantic"],
        labels=dice.integers(0, len(labels["semantic"].classes), (side, side), np.uint8),
        confidence=dice.random((side, side), np.float32),
    )
    labels["depth"] = replace(labels["depth"], metres=dice.random((side, side), np.float32) * 4)
    sample = replace(sample, image=dice.integers(0, 256, (side, side, 3), np.uint8))
    job = build_job(spec_of("run"), None)
    (encoded,) = shard_worker.encode_batch([sample], {}, job.document)
    worker = SimpleNamespace(_encode_samples=lambda *shard: [encoded], place=SimpleNamespace(read=lambda name: None))
    *blocks, end = write_tar(shard_worker.ShardWorker._files(worker, 0, 0, 1, []))
    assert 0.6 * job.sample_bytes < sum(map(len, blocks)) <= job.sample_bytes


def test_a_run_keeps_the_size_that_its_shards_have(tmp_path, monkeypatch, capsys):
    line, run = [word for word in LINE if word not in ("--shard-size", str(SIZE))], tmp_path / "run"
    monkeypatch.setattr(job_module, "SHARD_BYTES", 1_000_000)  # of 83,968 bytes: 11, of which five batches are 10
    assert generate.main([*line, "--out", str(run), "--limit", "10"]) == 0
    monkeypatch.undo()
    assert json.loads((run / "run.json").read_text())["config"]["shard_size"] == 10
    assert generate.main([*line, "--out", str(run), "--shard-size", "1000"]) == 2
    assert "shard_size: 10 there, 1000 asked for" in capsys.readouterr().err
    assert generate.main([*line, "--out", str(run)]) == generate.main([*line, "--out", str(run), "--shard-size", "10"])
    assert generate.main([*line, "--out", str(run), "--number", "33"]) == 0
    assert generate.main([*line, "--out", str(tmp_path / "one"), "--number", "33", "--shard-size", "10"]) == 0
    assert tree(run) == tree(tmp_path / "one")


def test_a_run_of_an_earlier_version_keeps_its_1000_samples(tmp_path, monkeypatch):
    line, run = [word for word in LINE if word not in ("--shard-size", str(SIZE))], tmp_path / "run"
    assert generate.main([*line, "--out", str(run), "--shard-size", "1000"]) == 0
    document = json.loads((run / "run.json").read_text())
    del document["config"]["shard_size"]
    (run / "run.json").write_text(json.dumps(document))
    monkeypatch.setattr(job_module, "SHARD_BYTES", 1_000_000)
    for more in ([], ["--shard-size", "1000"], ["--number", "33"]):
        assert generate.main([*line, "--out", str(run), *more]) == 0
    assert ShardFolder(run).names("manifest") == ["00000.json"] and len(datasetdm_fast.open_run(run)) == 33


def test_a_disk_needs_room_for_what_is_missing_alone(alone, bucket, tmp_path, monkeypatch):
    run = copy(alone, tmp_path)
    (run / entry_name(5)).unlink()
    monkeypatch.setattr(job_module.storage, "free_bytes", lambda path: job_module.SPARE + 100_000)
    make(run)  # of 83,968 bytes
    assert tree(run) == tree(alone)
    with pytest.raises(Missing, match="of disk"):
        make(tmp_path / "new")
    monkeypatch.chdir(tmp_path)  # which says nothing of a store
    work_on_shards(replace(spec_of("run"), url="memory://bucket/run"), bucket, ALONE, Callbacks(describe))


def test_any_rank_and_any_number_of_processes_makes_the_same_bytes(alone, tmp_path):
    for rank in (2, 0, 1):
        made = []
        make(
            tmp_path / "run",
            rank=ShardRank(rank, 3),
            on_commit=made.append,
            is_stopping=lambda made=made: len(made) == 2,
        )
    assert tree(tmp_path / "run") == tree(alone)


def test_a_run_that_was_stopped_resumes_to_the_same_bytes(alone, tmp_path):
    seen = []
    make(tmp_path / "run", on_commit=seen.append, is_stopping=lambda: len(seen) == 2)
    assert len(ShardFolder(tmp_path / "run").names("manifest")) == 2
    assert datasetdm_fast.open_run(tmp_path / "run").is_complete is False  # a run can be read while it is made
    make(tmp_path / "run")
    assert tree(tmp_path / "run") == tree(alone)


@pytest.mark.parametrize("seed", range(8 if IS_LONG else 1))
def test_kills_of_four_processes_change_no_byte(alone, tmp_path, monkeypatch, seed):
    started, begin, dice = [], spawn.start_process, random.Random(seed)

    def start(*arguments, **options):
        started.append(begin(*arguments, **options))
        return started[-1]

    def kill():
        for _ in range(4 if IS_LONG else 2):
            time.sleep(dice.uniform(0.5, 2.0))
            running = [process for process in started if process.poll() is None]
            if running:
                dice.choice(running).kill()

    monkeypatch.setattr(spawn, "start_process", start)
    killer = threading.Thread(target=kill)
    killer.start()
    places = [Place({"OMP_NUM_THREADS": "1", troubled.SECONDS: "0.3"}, 1)] * (4 if IS_LONG else 2)
    counts = []
    callbacks = Callbacks(describe, on_start=troubled.install, on_commit=counts.append)
    spawn.run_ranks(places, spec_of(tmp_path / "run"), ShardLedger(shard_place(tmp_path / "run")), callbacks)
    killer.join()
    make(tmp_path / "run")
    assert tree(tmp_path / "run") == tree(alone)
    assert sum(counts) == SAMPLES


def test_what_a_process_refuses_ends_the_others(alone, tmp_path):
    spec = spec_of(alone, seed=3)
    with pytest.raises(Refused, match="seed: 0 there, 3 asked for"):
        callbacks = Callbacks(describe, on_start=troubled.install)
        spawn.run_ranks([Place()], spec, ShardLedger(shard_place(alone)), callbacks)


def test_a_run_that_another_process_begins_between_two_looks_is_joined(alone, tmp_path, monkeypatch):
    place, document = ShardFolder(tmp_path), (alone / "run.json").read_bytes()
    names = place.names
    monkeypatch.setattr(place, "names", lambda: place.replace("run.json", document) or names())
    assert shard_worker.open_place(place) == json.loads(document)


def test_a_run_that_a_network_disk_lists_before_it_is_readable_is_joined(tmp_path, alone, monkeypatch):
    """As NFS does, which knows for a while that there was no such file; a link of that name asks the server."""
    place = ShardFolder(tmp_path)
    place.replace("run.json", (alone / "run.json").read_bytes())
    read, create, asked = place.read, place.create, []
    monkeypatch.setattr(place, "read", lambda name: read(name) if asked or name != "run.json" else None)
    monkeypatch.setattr(place, "create", lambda *file: asked.append(file) or create(*file))
    with pytest.raises(Refused, match="seed: 0 there, 3 asked for"):
        shard_worker.open_shards(spec_of(tmp_path, seed=3), place)
    asked.clear()
    job = shard_worker.open_shards(spec_of(tmp_path), place)
    assert len(asked) == 1 and job.document["plan"] == json.loads((alone / "run.json").read_bytes())["plan"]


def test_a_place_with_what_processes_write_before_run_json_may_hold_a_new_run(tmp_path):
    place = ShardFolder(tmp_path)
    for name in ("claims/00000", "shards/00000.tar", "manifest/00000.json"):
        place.replace(name, b"{}")
    assert shard_worker.open_place(place) is None
    place.replace("notes.txt", b"mine")
    with pytest.raises(Refused, match="it holds something other than a run in shards .*notes.txt"):
        shard_worker.open_place(place)


def test_every_instance_of_a_class_is_counted():
    labels = {"instance": [{"category_id": number} for number in (2, 1, 2)], "instance:b": []}
    names = {"instance": {1: "ball", 2: "cube"}, "instance:b": {1: "ball"}, "instance:c": {1: "cone"}}
    assert count_classes(Row(Request(0, "a ball", 0), {}, labels=labels), names) == {"cube": 2, "ball": 1}


def test_a_rank_begins_with_shards_of_its_own(alone):
    place = shard_place(alone)
    job, callbacks = shard_worker.open_shards(spec_of(alone), place), Callbacks(describe)
    orders = [shard_worker.ShardWorker(job, place, shard_worker.ShardRank(k, 2), callbacks).order for k in range(2)]
    ours = [shard for shard in orders[0] if shard % 2 == 0]
    assert orders == [ours + [k + 1 for k in ours if k + 1 in orders[0]], [k for k in orders[0] if k % 2] + ours]


def test_files_lie_in_a_shard_where_its_index_says_at_every_length(alone):
    """A file of a whole number of blocks of 512 bytes has nothing after it, one byte more has nearly a block."""
    place, made = shard_place(alone), []
    worker = SimpleNamespace(place=SimpleNamespace(read=lambda name: None))
    row = replace(next(iter(ShardLedger(place).rows())), files={"image": RowFile("images/a.png", None)})
    rows = [replace(row, request=replace(row.request, index=k)) for k in range(5)]
    contents = [bytes([k + 1]) * size for k, size in enumerate((512, 1, 1024, 513, 511))]
    worker._encode_samples = lambda indices: zip(rows, ({"image": content} for content in contents))
    tar = b"".join(write_tar(shard_worker.ShardWorker._files(worker, 0, 0, 5, made)))
    with tarfile.open(fileobj=io.BytesIO(tar)) as read:
        assert [read.extractfile(f"{each.request.id}.png").read() for each in rows] == contents
        records = [read.extractfile(f"{each.request.id}.json").read() for each in rows]
    found = [[tar[first : first + size] for first, size in map(places.get, ("image", RECORD))] for _, places in made]
    assert found == [[*pair] for pair in zip(contents, records, strict=True)]


def test_in_the_place_of_a_rejected_sample_others_are_made_as_often_as_the_plan_allows(monkeypatch):
    """The plan of 4 has room for 12, three turns a place; 6 is never taken, 7 at the second turn, 5 is NaN."""
    asked = []

    def made(job, batches, on_unet_call):
        assert on_unet_call is list  # which renews the claims of the worker below
        for batch in batches:
            yield batch, [result_for(index, batch.turn) for index in batch.indices]

    def result_for(index, turn):
        request = Request(index, "a ball", index + 100 * turn)
        if index == 5:
            return Quarantined(request, "NaN")
        rejection = "too dark" if index == 6 or (index, turn) == (7, 0) else ""
        return Sample(request, np.zeros((8, 8, 3), np.uint8), {}, rejection=rejection)

    def batches_of(indices, turn):
        asked.append((turn, [*indices]))
        return [SimpleNamespace(indices=[*indices], turn=turn)] if indices else []

    monkeypatch.setattr(shard_worker, "make_samples", made)
    monkeypatch.setattr(shard_worker, "batch_facts", lambda recipe, batch: {"batch": 1})
    job = SimpleNamespace(recipe=None, plan=SimpleNamespace(most=12, number=4, batches_of=batches_of))
    gate = SimpleNamespace(evaluate=list, check=dict)
    worker = SimpleNamespace(job=job, gate=gate, callbacks=Callbacks(describe), claims=SimpleNamespace(renew=list))
    told = [
        ([(each.request.index, each.request.seed, getattr(each, "reason", "")) for each in taken], facts)
        for taken, facts in shard_worker.ShardWorker._make_taken(worker, range(4, 8))
    ]
    assert asked == [(0, [4, 5, 6, 7]), (1, [6, 7]), (2, [6])]
    assert told == [
        ([(4, 4, ""), (5, 5, "NaN")], {"batch": 1}),
        ([(7, 107, "")], {"batch": 1, "turn": 1}),
        ([(6, 206, "too dark")], {"batch": 1, "turn": 2}),
    ]
    assert worker.rejections == 4


def test_files_of_two_decoders_of_a_task_have_names_of_their_own_in_a_shard(alone):
    place = shard_place(alone)
    worker = shard_worker.ShardWorker(
        shard_worker.open_shards(spec_of(alone), place), place, ALONE, Callbacks(describe)
    )
    row, roles = next(iter(ShardLedger(place).rows())), ("semantic.one", "semantic.two")
    row = replace(row, files={role: RowFile(f"{role}/a.png", None) for role in roles})
    worker._encode_samples = lambda indices: [(row, dict.fromkeys(roles, b"map"))]
    names = [name for name, _ in worker._files(99, 0, 1, [])]
    assert names == [f"{row.request.id}.{end}" for end in ("semantic.one.png", "semantic.two.png", "json")]


def test_a_shard_that_is_made_twice_is_committed_once(alone, tmp_path, monkeypatch):
    run, place = copy(alone, tmp_path), ShardFolder(tmp_path / "run")
    job = shard_worker.open_shards(spec_of(run), place)
    worker = shard_worker.ShardWorker(job, place, ALONE, Callbacks(describe))
    entry = (run / entry_name(2)).read_bytes()
    for committed in (None, entry.replace(b"first", b"other"), entry):  # None: it can no longer be read
        reads = []
        monkeypatch.setattr(
            place,
            "read",
            lambda name, reads=reads, it=committed: reads.append(name) or (it if len(reads) > 2 else None),
        )
        if committed == entry:
            assert worker._make(2) == 0 and worker.made == 0
            continue
        with pytest.raises(GateFailed, match="with other bytes"):
            worker._make(2)
        assert not (run / entry_name(2)).exists()  # so that nobody reads the files of one as those of the other
        (run / entry_name(2)).write_bytes(entry)
    assert tree(run) == tree(alone)


@pytest.mark.parametrize("reads", [1, 2])  # before the shard is begun, and when its files are written
def test_a_shard_that_another_process_commits_meanwhile_is_left_to_it(alone, tmp_path, monkeypatch, reads):
    run, place, looks = copy(alone, tmp_path), ShardFolder(tmp_path / "run"), []
    worker = shard_worker.ShardWorker(shard_worker.open_shards(spec_of(run), place), place, ALONE, Callbacks(describe))
    read, written = place.read, (run / tar_name(2)).stat()
    monkeypatch.setattr(
        place, "read", lambda name: looks.append(name) or (read(name) if looks.count(entry_name(2)) >= reads else None)
    )
    assert worker.claims.take(2) and worker._make(2) == 0 == worker.made
    assert looks.count(entry_name(2)) == reads and not place.names("claims")
    assert tree(run) == tree(alone) and (run / tar_name(2)).stat().st_ino == written.st_ino  # it is not written again


def test_a_run_of_shards_ends_where_the_gate_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_worker.DomainGate, "is_closed", True)
    monkeypatch.setattr(shard_worker.DomainGate, "outside", 2, raising=False)
    with pytest.raises(GateFailed, match="are out of the domain of the decoders"):
        make(tmp_path / "run")
    place = ShardFolder(tmp_path / "run")
    assert not place.names("manifest") and not place.names("claims")


def test_a_run_of_shards_is_judged_once(alone, tmp_path, monkeypatch):
    def count(gate, results):
        gate.outside = gate.measured = 0 if gate._is_open else 2

    monkeypatch.setattr(shard_worker.DomainGate, "evaluate", count)
    with pytest.raises(GateFailed, match="are out of the domain of the decoders"):
        make(tmp_path / "new")
    make(run := copy(alone, tmp_path), number=33)  # its growth would have begun by taking its last shard out
    assert len(datasetdm_fast.open_run(run)) == 33
    small = ["--layout", "shards", "--batch-size", "1", "--quiet", "--out", str(tmp_path / "small")]
    assert generate.main([*small, "--number", "3", "--force-domain"]) == 0  # its only shard is taken out
    assert generate.main([*small, "--number", "33"]) == 0


def test_a_store_holds_the_bytes_of_a_disk(alone, bucket):
    make("run", bucket)
    assert contents(bucket) == contents(ShardFolder(alone))
    run = datasetdm_fast.open_run("memory://bucket/run")
    assert len(run) == SAMPLES and run.is_complete
    assert (run["00000007"].image == datasetdm_fast.open_run(alone)["00000007"].image).all()
    assert audit.main(["memory://bucket/run", "--quiet"]) == 0
    with pytest.raises(Refused, match="^memory://bucket/run: it holds a run with other settings"):
        make("run", bucket, seed=3)


def test_a_store_that_answers_503_ends_in_a_sentence_and_resumes(alone, bucket, monkeypatch):
    files, calls, dice = type(bucket.files), [], random.Random(0)
    real = files.pipe_file

    def pipe_file(self, *arguments, **options):
        calls.append(1)
        if dice.random() < 0.3:
            raise OSError("503 Slow Down")
        return real(self, *arguments, **options)

    monkeypatch.setattr(files, "pipe_file", pipe_file)
    failures = 0
    while len(bucket.names("manifest")) < 6:
        try:
            make("run", bucket)
        except Missing as stop:
            failures += "503 Slow Down" in stop.cause
    assert failures and contents(bucket) == contents(ShardFolder(alone))


def test_a_store_that_takes_half_a_file_is_told(bucket, monkeypatch):
    def put_half(self, source, target):
        self.pipe_file(target, open(source, "rb").read()[:3])

    monkeypatch.setattr(type(bucket.files), "put_file", put_half)
    assert bucket.write("shards/a", [b"one"]) == StoredFile(sha256(b"one").hexdigest(), 3)
    with pytest.raises(Missing, match="^memory://bucket/run/shards/a: it is incomplete"):
        bucket.write("shards/a", [b"one", b"two"])


@pytest.mark.parametrize("call", ["open", "cat_file"])
def test_a_store_that_does_not_answer_says_nothing_of_its_files(alone, bucket, monkeypatch, tmp_path, capsys, call):
    make("run", bucket)
    before, real = contents(bucket), getattr(type(bucket.files), call)

    def fail(self, path, *arguments, **options):
        if path.endswith((tar_name(2), index_name(2))):
            raise TimeoutError("no answer")
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(type(bucket.files), call, fail)
    for command in (
        [audit.main, bucket.name, "--repair"],
        [convert.main, bucket.name, "--to", "coco", "--out", str(tmp_path / "export")],
    ):
        assert command[0]([*command[1:], "--quiet"]) == 3
        assert capsys.readouterr().err.startswith("memory://bucket/run: TimeoutError: no answer\n")
    with pytest.raises(Unanswered):  # nor is a picture bad
        open_data(f"run:{bucket.name}[all]", 64, tasks=("semantic",), skip_bad=True).readable()
    monkeypatch.setattr(type(bucket.files), call, real)
    assert contents(bucket) == before


def test_a_store_that_no_longer_answers_when_pictures_are_read_has_no_damaged_ones(
    alone, bucket, monkeypatch, tmp_path, capsys
):
    make("run", bucket)
    read = ShardLedger.read_file

    def fail(self, row, role):
        if role != RECORD:
            raise Unanswered("no answer", "Run the same command again.")
        return read(self, row, role)

    monkeypatch.setattr(ShardLedger, "read_file", fail)
    for line in ([audit.main], [convert.main, "--to", "coco", "--out", str(tmp_path / "export")]):
        assert line[0]([bucket.name, *line[1:], "--quiet"]) == 3 and capsys.readouterr().err.startswith("no answer\n")
    with pytest.raises(Unanswered):
        datasetdm_fast.open_run(bucket.name)[0].label("semantic")


def test_what_a_store_cannot_open_is_told_once(alone, bucket):
    make("run", bucket)
    ledger = ShardLedger(bucket)
    bucket.remove(tar_name(2))
    with pytest.raises(Missing, match="^memory://bucket/run: FileNotFoundError") as stop:
        ledger.row(11)
    assert stop.value.cause.count("memory://bucket/run") == 1
    bucket.remove(index_name(1))
    with pytest.raises(Refused, match="00001.parquet: it is missing or has changed since it was written"):
        ledger.row(7)
    assert audit.main([bucket.name, "--quiet"]) == 4  # a store that says so has answered


def test_runs_in_shards_need_a_library(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert generate.main([*LINE, "--out", str(tmp_path / "run")]) == 3
    assert "runs in shards: pyarrow is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [0, 3])
def test_a_run_that_another_process_begins_while_a_model_is_loaded_is_joined_or_refused(
    alone, tmp_path, monkeypatch, seed
):
    place, document = ShardFolder(tmp_path), (alone / "run.json").read_bytes()
    monkeypatch.setattr(place, "create", lambda name, content: bool(place.replace(name, document)))
    with nullcontext() if not seed else pytest.raises(Refused, match="seed: 0 there, 3 asked for"):
        job = shard_worker.open_shards(spec_of(tmp_path, seed=seed), place)
        assert job.document == json.loads(document)


def test_a_run_that_another_process_lets_grow_while_a_model_is_loaded_does_not_shrink(alone, tmp_path, monkeypatch):
    run, place = copy(alone, tmp_path), ShardFolder(tmp_path / "run")
    grown = json.loads((run / "run.json").read_bytes())
    for part in ("config", "plan"):
        grown[part]["number"] = 40
    build = shard_worker.build_job

    def build_slowly(spec, stored):
        place.replace("run.json", pretty(grown))
        return build(spec, stored)

    monkeypatch.setattr(shard_worker, "build_job", build_slowly)
    with pytest.raises(Refused, match="number: 40 there, 33 asked for"):
        shard_worker.open_shards(spec_of(run, number=33), place)
    assert json.loads((run / "run.json").read_bytes()) == grown


def test_a_disk_has_no_buckets_that_may_be_missing(tmp_path):
    ShardBucket(f"file://{tmp_path}/none").require_bucket(is_made=False)
    assert not list(tmp_path.iterdir())


def test_a_store_whose_library_is_not_there_is_missing(monkeypatch):
    def url_to_fs(url, **_):
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    with pytest.raises(Missing, match="^s3://bucket/run: Please install s3fs") as stop:
        ShardBucket("s3://bucket/run")
    assert stop.value.remedy.startswith("Install it")


def test_names_of_a_store_that_lead_out_of_a_run_are_refused(bucket, monkeypatch):
    for name in ("a", "part/b"):
        bucket.replace(name, b"12")
    bucket.replace(".c.123000000001.part", b"half of it")
    assert bucket.sizes() == {"a": 2, "part/b": 2}
    with monkeypatch.context() as patch:  # of a store that does not say how large a file is
        patch.setattr(type(bucket.files), "find", lambda *_, **options: {"/bucket/run/a": {"size": None}})
        assert bucket.sizes() == {"a": 0}
    bucket.replace("part/a\\..", b"")
    with pytest.raises(Refused, match="memory://bucket/run: "):
        bucket.sizes()


def copy(alone, tmp_path):
    for name, content in tree(alone).items():
        ShardFolder(tmp_path / "run").replace(name, content)
    return tmp_path / "run"


def test_files_that_are_no_json_are_told_in_a_sentence(alone, bucket, tmp_path, capsys):
    run = copy(alone, tmp_path)
    (run / entry_name(2)).write_bytes(b"[")
    assert audit.main([str(run), "--quiet"]) == 4 and generate.main([*LINE, "--out", str(run)]) == 2
    (found,), told = (lines.splitlines() for lines in capsys.readouterr())
    assert found.startswith("manifest/00002.json: not an entry of the manifest (it: not readable as JSON")
    assert len(told) == 4 and told[2].startswith(f"{run}/manifest/00002.json: not an entry of the manifest (it: not")
    (run / "run.json").write_bytes(b"{")
    assert audit.main([str(run), "--quiet"]) == 4 and generate.main([*LINE, "--out", str(run)]) == 2
    (found,), told = (lines.splitlines() for lines in capsys.readouterr())
    assert found.startswith("run.json: not readable as JSON")
    assert len(told) == 4 and told[2].startswith(f"{run}/run.json: not readable as JSON")
    bucket.replace("run.json", b"{")
    assert audit.main([bucket.name, "--quiet"]) == 2
    assert f"{bucket.name}/run.json: not readable as JSON" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["torn", "missing", "index", "entry"])
def test_damage_is_named_and_repaired_to_the_same_bytes(alone, tmp_path, capsys, damage):
    run = copy(alone, tmp_path)
    match damage:
        case "torn":
            (run / tar_name(2)).write_bytes((run / tar_name(2)).read_bytes()[:5000])
        case "missing":
            (run / tar_name(2)).unlink()
        case "index":
            (run / index_name(2)).write_bytes(b"PAR1")
        case "entry":
            (run / entry_name(2)).write_bytes(b'{"first": 10}')
    assert audit.main([str(run), "--quiet", "--repair"]) == 4
    told = {"torn": "shards/00002.tar: its bytes are not those", "missing": "shards/00002.tar: is not there. Take"}
    assert told.get(damage, "00002") in capsys.readouterr().out
    make(run)
    assert tree(run) == tree(alone) and audit.main([str(run), "--quiet"]) == 0


def change_entry(run, **changes):
    place = run / entry_name(2)
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


def change_index(run, change):
    """Shard 2 with another index, whose digest its entry has; `change` is given rows and places, by sample."""
    index = ShardIndex.decode((run / index_name(2)).read_bytes())
    rows, places = change(dict(index.rows), {key: dict(each) for key, each in index.places.items()})
    if isinstance(content := rows, dict):
        content = encode_index(list(rows.values()), [places[index] for index in rows], [Counter()] * len(rows))
    stored = StoredFile(sha256(content).hexdigest(), len(content))
    (run / index_name(2)).write_bytes(content)
    files = json.loads((run / entry_name(2)).read_text())["files"]
    change_entry(run, files=files | {index_name(2): asdict(stored)})


def move(role, index, other_role, other):
    """A file of a sample is looked for where another lies."""
    return lambda rows, places: (rows, places | {index: places[index] | {role: places[other][other_role]}})


def sized(size):
    return lambda rows, places: (rows, places | {11: places[11] | {RECORD: (0, size)}})


def said(rows, places):
    return {**rows, 11: replace(rows[11], request=replace(rows[11].request, prompt="another"))}, places


CHANGES = {
    "another tar file": (lambda run: change_entry(run, files={}), "it names other files than those of its shard"),
    "a sample too many": (lambda run: change_entry(run, stop=16), "it has other samples than its shard"),
    "no sample": (lambda run: change_entry(run, stop=10), "it has other samples than its shard"),
    "the samples of another": (lambda run: change_entry(run, first=9), "it has other samples than its shard"),
    "no Parquet": (lambda run: change_index(run, lambda *_: (b"PAR1", 0)), "not the index of a shard"),
    "Parquet without columns": (
        lambda run: change_index(run, lambda *_: (b"PAR1" + bytes(99) + b"\x63\0\0\0PAR1", 0)),
        "not the index of a shard",
    ),
    "another record": (lambda run: change_index(run, move(RECORD, 11, RECORD, 12)), "it is that of sample"),
    "an image for a record": (lambda run: change_index(run, move(RECORD, 11, "image", 11)), "is damaged"),
    "a record of -1 bytes": (lambda run: change_index(run, sized(-1)), "a file of sample 00000011 has -1 bytes"),
    "a record of 1 TB": (lambda run: change_index(run, sized(10**12)), "has 1000000000000 bytes"),
}
AUDITED = {
    "a sample too few": (lambda run: change_entry(run, stop=14), "it ends with sample 13"),
    "a row too few": (
        lambda run: change_index(run, lambda rows, places: ({k: rows[k] for k in range(10, 14)}, places)),
        "its samples are not those of the manifest",
    ),
    "another prompt": (lambda run: change_index(run, said), "the record of 00000011 is not that of its row"),
}


@pytest.mark.parametrize("change", [*CHANGES, *AUDITED])
def test_what_somebody_changed_in_a_shard_is_named_and_refused(alone, tmp_path, capsys, change):
    run = copy(alone, tmp_path)
    damage, told = (CHANGES | AUDITED)[change]
    damage(run)
    assert audit.main([str(run), "--quiet"]) == 4
    assert told in capsys.readouterr().out
    if change in CHANGES:
        with pytest.raises(Refused, match=told) as refused:
            ShardLedger(ShardFolder(run)).row(11)
        assert refused.value.cause.startswith(f"{run}/")


@pytest.mark.parametrize(
    ("name", "content"),
    [("dropped.json", text) for text in ("[", "7", "[7]", '["x"]', "{}")]
    + [("scores/00002.json", text) for text in ("{", "[]", '{"indices": [1], "scores": {"a": [1, 2]}}')]
    + [("scores/00002.json", '{"indices": [1], "scores": {"a": 3}}')],
)
def test_a_damaged_selection_of_shards_is_refused(alone, tmp_path, name, content):
    run = copy(alone, tmp_path)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    with pytest.raises(Refused, match=f"{name}: not ") as raised:
        datasetdm_fast.open_run(run).ledger.score_names()
    assert raised.value.remedy.startswith("Delete it, then ")


def test_a_ledger_of_shards_is_read_in_other_processes(alone):
    """Of a data loader, to which it is pickled, or which is forked and shares places in open files with its parent."""
    ledger = ShardLedger(ShardFolder(alone))
    row = ledger.row(11)
    again = pickle.loads(pickle.dumps(ledger))
    assert ledger._open and not again._open and again.row(11) == row
    (files,) = again._open.values()
    again._process = -1
    assert again.read_file(row, "image") == ledger.read_file(row, "image")
    assert list(again._open.values()) != [files] and not files.closed


def test_a_shard_whose_entry_is_taken_out_while_a_run_grows_is_no_damage(alone, tmp_path, capsys, monkeypatch):
    run, names = copy(alone, tmp_path), ShardFolder.names
    (run / entry_name(5)).unlink()  # after it was listed
    listed = {"manifest": [f"{shard:05d}.json" for shard in range(6)]}
    monkeypatch.setattr(ShardFolder, "names", lambda self, folder="": listed.get(folder) or names(self, folder))
    assert audit.main([str(run), "--quiet"]) == 0
    assert f"whole, 25 of {SAMPLES} samples (1 still to be made)" in capsys.readouterr().out
    assert len(datasetdm_fast.open_run(run)) == 25


def test_parts_of_an_audit_are_the_whole(alone, folder, tmp_path, capsys):
    run = copy(alone, tmp_path)
    (run / tar_name(4)).unlink()
    (run / entry_name(1)).unlink()
    reports = []
    for part, code in (("1/4", 4), ("2/4", 0), ("3/4", 0), ("4/4", 0)):  # shards 0 and 4; 1 and 5; 2; 3
        assert audit.main([str(run), "--part", part, "--json", "--quiet"]) == code
        reports.append(json.loads(capsys.readouterr().out))
    assert [report["number"] for report in reports] == [10, 6, 5, 5] and [r["done"] for r in reports] == [10, 1, 5, 5]
    assert [report["complete"] for report in reports] == [True, False, True, True]
    assert [report["files"] for report in reports] == [4, 2, 2, 2]  # two a shard
    assert audit.main([str(run), "--json", "--quiet"]) == 4
    whole = json.loads(capsys.readouterr().out)
    for name in ("number", "done", "files", "bytes", "findings", "damaged"):
        assert sum((report[name] for report in reports), type(whole[name])()) == whole[name]
    progress = []
    audit_place(str(run), 1, lambda *counts: progress.append(counts), "1/4")
    assert progress == [(5, 6), (10, 6)]  # of about a fourth of all
    assert audit.main([str(run), "--part", "2/4", "--quiet"]) == 0
    assert f"{run}, part 2/4: whole, 1 of 6 samples (5 still to be made), 2 files" in capsys.readouterr().out
    (run / tar_name(5)).unlink()
    assert audit.main([str(run), "--part", "2/4", "--json", "--quiet"]) == 4
    assert json.loads(capsys.readouterr().out)["damaged"] == [25]  # the last shard holds one sample
    for place, part, cause in (
        (run, "5/4", "--part '5/4': expected k/n"),
        (run, "0/0", "--part '0/0': expected k/n"),
        (folder, "1/4", "is no run in shards"),
    ):
        assert audit.main([str(place), "--part", part]) == 2 and cause in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--shard-size", "0"], "expected 1 or more"),
        (["--shard-size", "7"], "shard_size: 5 there, 7 asked for"),
        (["--layout", "folder", "--shard-size", "1000"], "layout"),
        (["--number", "20"], "number: 26 there, 20 asked for"),
        (["--batch-size", "3"], "batch_size: "),
        (["--engine", "torch"], "engine: "),
        (["--number", "60", "--prompts", "PROMPTS"], "image 00000000 would change"),
        (["--keep", "trusted"], "keep: nothing there"),
        (["--layout", "folder"], "the run is not in shards"),
    ],
)
def test_other_settings_are_refused_in_a_sentence(alone, tmp_path, capsys, flags, cause):
    before = tree(alone)
    (tmp_path / "prompts.txt").write_text("a cube\n" * 60)
    flags = [flag.replace("PROMPTS", str(tmp_path / "prompts.txt")) for flag in flags]
    assert generate.main([*LINE, "--out", str(alone), *flags]) == 2
    assert cause in capsys.readouterr().err and tree(alone) == before


def test_a_run_grows_to_the_bytes_of_a_larger_one(alone, tmp_path, monkeypatch):
    run, place = copy(alone, tmp_path), ShardFolder(tmp_path / "run")
    make(tmp_path / "other", number=33)
    ledger = ShardLedger(place, number=33)
    assert sorted(ledger.entries) == [0, 1, 2, 3, 4]  # whoever waits for 33 samples waits for the sixth shard, too
    make(run, number=33)
    assert tree(run) == tree(tmp_path / "other") and len(ledger.read_entries(range(7))) == 2


def test_a_last_shard_that_is_committed_after_its_run_has_grown_is_made_again(alone, tmp_path):
    run, smaller = copy(alone, tmp_path), tmp_path / "smaller"
    make(smaller, number=22)
    for name in shard_worker.files_of_shard(4):  # by a process that was started before, with the smaller number
        ShardFolder(run).replace(name, ShardFolder(smaller).read(name))
    assert generate.main([*LINE, "--out", str(run)]) == 0 and tree(run) == tree(alone)


def test_others_are_made_in_the_place_of_doubtful_samples(alone, tmp_path, capsys):
    """Each shard has its number of trusted samples, whoever makes it, and a larger run has the same ones first."""
    run, options = tmp_path / "run", {"keep": "trusted"}
    for rank in (1, 0):
        made = []
        callbacks = Callbacks(describe, on_commit=made.append, is_stopping=lambda made=made: len(made) == 3)
        work_on_shards(spec_of(run, **options), shard_place(run), ShardRank(rank, 2), callbacks)
    assert generate.main([*LINE, "--keep", "trusted", "--json", "--out", str(tmp_path / "one")]) == 0
    rejected = json.loads(capsys.readouterr().out)["doubtful"]
    assert tree(run) == tree(tmp_path / "one") and audit.main([str(run), "--quiet"]) == 0
    shown = showing.show(run, is_served=True)
    facts = json.loads((shown.folder / "gallery/run.js").read_text().partition(",0,")[2].removesuffix(");\n"))
    assert (facts["doubtful"], facts["aside"], facts["samples"]) == (0, 0, SAMPLES)  # of those that it shows
    samples, plain = list(datasetdm_fast.open_run(run)), list(datasetdm_fast.open_run(alone))
    assert len(samples) == SAMPLES and all(sample.trust.is_trusted for sample in samples)
    others = [sample for sample in samples if sample.meta.get("turn")]
    assert [sample.id for sample in others] == [sample.id for sample in plain if not sample.trust.is_trusted]
    assert sum(sample.meta["turn"] for sample in others) == rejected > 0
    doubtful = [int(sample.id) for sample in others]
    for sample in (sample for sample in others if sample.meta["turn"] == 1):
        same = [index for index in doubtful if index // SIZE == int(sample.id) // SIZE]  # of a shard, made together
        assert sample.meta["place"] == same.index(int(sample.id)) % BATCH
    assert all(sample.seed == int(sample.id) + TURN * sample.meta.get("turn", 0) for sample in samples)
    for place in (run, tmp_path / "larger"):
        work_on_shards(spec_of(place, number=33, **options), shard_place(place), ALONE, Callbacks(describe))
    assert tree(run) == tree(tmp_path / "larger")


def test_a_place_without_a_sample_that_is_accepted_is_told(tmp_path, capsys):
    line = [*LINE, "--number", "5", "--accept", "sharpness < 0", "--most-tries", "2", "--out", str(tmp_path / "run")]
    assert generate.main(line) == 4
    assert "5 of 5 samples were quarantined" in (error := capsys.readouterr().err) and "manifest/ has" in error
    assert "a larger --most-tries may find accepted samples" in error


def test_every_class_has_its_number_of_accepted_samples(tmp_path):
    accepted = {"accept": "sharpness > 300", "per_class": 4, "classes": ("ball", "cube", "star")}
    work_on_shards(spec_of(tmp_path, **accepted), shard_place(tmp_path), ALONE, Callbacks(describe))
    run = datasetdm_fast.open_run(tmp_path)
    named = Counter(name for sample in run for name in accepted["classes"] if name in sample.prompt)
    assert set(named.values()) == {4} and run.is_complete and any(sample.meta.get("turn") for sample in run)


def test_the_layout_that_is_not_named_follows_from_the_run(alone, folder, tmp_path):
    def layout(provided=(), **flags):
        config = RunConfig(**{"out": str(tmp_path / "new"), **flags})
        return complete_settings(config, {"out", *provided}).layout

    assert [layout(number=number) for number in (100_000, 100_001)] == ["folder", "shards"]
    assert layout(store="s3://bucket/run") == layout(cluster="ray") == layout(out=str(alone)) == "shards"
    assert layout(out=str(folder), number=200_000) == layout(("layout",), number=200_000) == "folder"


def test_a_place_that_holds_something_else_is_refused(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert generate.main([*LINE, "--out", str(tmp_path)]) == 2
    assert "something other than a run in shards ('notes.txt')" in capsys.readouterr().err
    assert generate.main([*LINE, "--out", str(folder)]) == 2
    assert "it is a run folder, not a run in shards" in capsys.readouterr().err


def test_the_command_starts_as_many_processes_as_are_asked_for(tmp_path, monkeypatch):
    def run_ranks(places, spec, ledger, callbacks):
        started.append(len(places))
        work_on_shards(spec, ledger.place, ALONE, callbacks)

    started = []
    monkeypatch.setattr(sharded_run, "run_ranks", run_ranks)
    assert generate.main([*LINE, "--ranks", "2", "--out", str(tmp_path / "run")]) == 0 and started == [2]
    assert len(datasetdm_fast.open_run(tmp_path / "run")) == SAMPLES


def test_a_run_that_is_interrupted_before_its_first_shard_is_made_again_counts_what_was_dropped(
    tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    make(run, number=2)
    assert drop.main([str(run), "00000001", "--quiet"]) == 0
    monkeypatch.setattr(sharded_run, "work_on_shards", lambda spec, place, *_: shard_worker.open_shards(spec, place))
    assert generate.main([*LINE, "--json", "--out", str(run)]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["done"], facts["made"], facts["doubtful"], facts["complete"]) == (0, 0, 0, False)


def test_the_command_resumes_and_reports(alone, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    assert generate.main([*LINE, "--out", out, "--limit", "7"]) == 0
    assert "10 of 26 samples are there; resume with" in capsys.readouterr().err
    ended = json.dumps({"host": claims.host(), "process": 1 << 40, "deaths": 0})
    (tmp_path / "run" / "claims" / "00000").write_text(ended)  # killed before it had removed it
    assert generate.main([*LINE[:-1], "--out", out, "--json"]) == 0 and tree(tmp_path / "run") == tree(alone)
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert facts["complete"] and (facts["done"], facts["made"]) == (SAMPLES, 16) and "nothing to do" not in told.err
    assert "images     16 of 26" in told.err
    (tmp_path / "run" / "claims" / "00003").write_text(ended)
    for name in ("manifest/.00003", ".run"):
        (tmp_path / "run" / f"{name}.json.{1 << 40}{10**8}.part").write_text("{")
    monkeypatch.setattr(shard_worker, "build_job", None)  # nothing is loaded for a run that is complete
    assert generate.main([*LINE[:-1], "--out", out]) == 0 and "nothing to do" in capsys.readouterr().err
    assert tree(tmp_path / "run") == tree(alone)


@pytest.mark.parametrize(
    ("command", "flags", "told"),
    [
        (gallery.main, [], "as it is looked at"),
        (vary.main, ["--domain", "night", "--out", "other"], "its samples are in shards"),
        (
            lambda line: generate.main(["--out", line[0], "--only", "00000007"]),
            [],
            "in shards, of which none is changed",
        ),
    ],
)
def test_what_cannot_be_done_with_shards_is_refused_in_a_sentence(alone, capsys, command, flags, told):
    before = tree(alone)
    assert command([str(alone), *flags]) == 2
    assert told in capsys.readouterr().err and tree(alone) == before


def test_selections_are_small_files_beside_the_shards(alone, folder, tmp_path, capsys):
    """Filter, split, drop and restore answer as for a run folder; convert and train follow them."""
    run, answers = copy(alone, tmp_path), {}
    shutil.copytree(folder, tmp_path / "folder")
    lines = [
        (filtering.main, "--where", "sharpness > 300 and trust == 1"),
        (split.main, "--shares", "60,40", "--names", "train,val"),
        (drop.main, "--where", "duplicate == 1"),
        (drop.main, "00000003", "00000017"),
        (restore.main, "00000017"),
    ]
    for place in (run, tmp_path / "folder"):
        answers[place] = []
        for command, *flags in lines:
            assert command([str(place), *flags, "--json", "--quiet"]) == 0
            answers[place].append(json.loads(capsys.readouterr().out) | {"path": ""})
        samples = datasetdm_fast.open_run(place, kept=True)
        source = RunSamples(place, "train", 64, ("semantic",))
        answers[place] += [[sample.id for sample in samples], len(source), samples.ledger.count()]
        line = [str(place), "--to", "wds", "--kept", "--part", "2/2", "--out", str(tmp_path / f"{place.name}-export")]
        assert convert.main([*line, "--quiet", "--json"]) == 0
        answers[place].append(json.loads(capsys.readouterr().out)["samples"])
    assert answers[run] == answers[tmp_path / "folder"]
    assert audit.main([str(run), "--quiet"]) == 0
    for command in (filtering.main, split.main):
        assert command([str(run), "--undo", "--quiet"]) == 0
    assert restore.main([str(run), "--all", "--quiet"]) == 0
    after = {name: content for name, content in tree(run).items() if not name.startswith("scores/")}
    assert after == {**tree(alone), "state/lock": b""}


def test_processes_change_what_lies_beside_shards_one_after_the_other(alone, tmp_path, capsys):
    run, part = copy(alone, tmp_path), f".00000.json.{1 << 40}{10**8}.part"
    assert filtering.main([str(run), "--quiet"]) == 0
    (run / "scores" / part).write_bytes(b"")  # of a process that was killed
    first, second = (datasetdm_fast.open_run(run) for _ in range(2))  # before either has changed anything
    assert dropping.drop(first, [3]) == [3] and dropping.drop(second, [7]) == [7]
    assert json.loads((run / "dropped.json").read_text()) == ["00000003", "00000007"]
    assert not (run / "scores" / part).exists()
    assert second.shards.scored.shards  # before the first has written some
    first.shards.scored.write(0, {"clip": {0: 0.5}})
    with second.shards.hold():
        assert second.shards.scored.shards[0]["clip"][0] == 0.5
    shutil.rmtree(run / "scores")  # which a filter would write again
    capsys.readouterr()
    with storage.hold_lock(run / "state/lock"):
        for command, *line in ((drop.main, "00000009"), (restore.main, "--all"), (filtering.main,)):
            assert command([str(run), *line]) == 2
            assert "another process is writing to this run folder" in capsys.readouterr().err


def test_distances_of_shards_are_those_among_the_samples_that_are_left(alone, folder, tmp_path, capsys):
    """As those of a run folder: a duplicate of a dropped sample is none, until that is restored."""
    places, results = (copy(alone, tmp_path), tmp_path / "folder"), []
    shutil.copytree(folder, places[1])
    for place in places:
        assert filtering.main([str(place), "--quiet"]) == 0
        results.append([])
        for command, *flags in ((drop.main, "00000000", "00000002", "00000008"), (restore.main, "--all")):
            assert command([str(place), *flags, "--quiet"]) == 0
            table = read_scores(datasetdm_fast.open_run(place).ledger, ["distance"])
            results[-1].append(dict(zip(table.indices, table.values["distance"].tolist(), strict=True)))
    assert results[0] == results[1] and len(results[0][0]) == SAMPLES - 3 and results[0][0][1] == 64
    assert results[0][1][1] < 64
    capsys.readouterr()


def test_distances_are_those_to_earlier_samples_in_whichever_order_they_are_scored(alone, tmp_path):
    tables = []
    for name, early in (("late", [(drop.main, "00000000"), (filtering.main,), (restore.main, "--all")]), ("once", [])):
        run = shutil.copytree(alone, tmp_path / name)
        for command, *flags in (*early, (filtering.main,)):
            assert command([str(run), *flags, "--quiet"]) == 0
        tables.append(read_scores(datasetdm_fast.open_run(run).ledger, ["distance"]).values["distance"].tolist())
    assert tables[0] == tables[1] and tables[0][0] == 64


def test_a_finished_run_in_shards_counts_no_dropped_samples(alone, tmp_path, capsys):
    run, counts = copy(alone, tmp_path), []
    samples = list(datasetdm_fast.open_run(run))
    doubtful = [sample.id for sample in samples if not sample.trust.is_trusted]
    trusted = next(sample.id for sample in samples if sample.trust.is_trusted)
    for dropped in ((), doubtful[:1], [doubtful[-1], trusted]):
        assert not dropped or drop.main([str(run), *dropped, "--quiet"]) == 0
        capsys.readouterr()
        assert generate.main([*LINE, "--json", "--out", str(run)]) == 0
        facts = json.loads(capsys.readouterr().out)
        counts.append((facts["done"], facts["doubtful"]))
    assert counts == [(SAMPLES, len(doubtful)), (SAMPLES - 1, len(doubtful) - 1), (SAMPLES - 3, len(doubtful) - 2)]


def test_an_audit_of_shards_tells_what_is_dropped(alone, tmp_path, capsys):
    run = copy(alone, tmp_path)
    assert drop.main([str(run), "00000000", "00000003", "00000020", "--quiet"]) == 0
    capsys.readouterr()
    assert audit.main([str(run), "--quiet"]) == 0
    assert f"whole, 23 of {SAMPLES} samples (complete, 3 dropped)" in capsys.readouterr().out
    for part, done, dropped in (("1/4", 7, 3), ("2/4", 6, 0)):  # shards 0 and 4; 1 and 5
        assert audit.main([str(run), "--part", part, "--json", "--quiet"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["done"], report["dropped"], report["set_aside"]) == (done, dropped, 0) and report["complete"]
    (run / "dropped.json").write_text("[")
    assert audit.main([str(run), "--quiet"]) == 4
    assert "dropped.json: not a list of ids" in capsys.readouterr().out


def test_samples_of_a_shard_that_were_left_unscored_are_scored(alone, tmp_path):
    """A shard that grew, or a restored sample: one score of it may be stored where a filter is interrupted."""
    run = copy(alone, tmp_path)
    curation.score_missing(datasetdm_fast.open_run(run), None, 1)
    expected = ShardScores(shard_place(run)).shards[1]
    path = run / "scores/00001.json"
    whole = json.loads(path.read_text())
    for names in (("distance",), ("distance", "hash")):
        columns = {name: [*each[:-1], None] if name in names else each for name, each in whole["scores"].items()}
        path.write_text(json.dumps({**whole, "scores": columns}))
        assert curation.count_missing(datasetdm_fast.open_run(run)) == 1
        curation.score_missing(datasetdm_fast.open_run(run), None, 1)
        assert ShardScores(shard_place(run)).shards[1] == expected


def test_scores_of_a_shard_are_added_to_and_forgotten_by_their_name(tmp_path):
    place = ShardFolder(tmp_path)
    scores = ShardScores(place)
    scores.write(2, {"clip": {11: 0.25}, "score": {11: 0.5}})
    scores.write(0, {"clip": {3: 1.0}})
    scores.write(2, {"clip": {10: None, 11: 0.75}})
    for again in (scores, ShardScores(place)):
        assert list(again.of("clip")) == [(3, 1.0), (10, None), (11, 0.75)]
        assert {k: v for k, v in again.of("score") if v is not None} == {11: 0.5} and again.names() == ["clip", "score"]
    scores.forget("clip", ("clip", "another digest"))
    again = ShardScores(place)
    assert again.names() == ["score"] and place.read("scores/clip") == b"another digest"


def test_scores_of_a_clip_take_the_place_of_those_of_another(alone, tmp_path):
    run = copy(alone, tmp_path)
    for digest, value in (("a", 0.1), ("b", 0.2), ("b", 0.3)):
        clip = SimpleNamespace(digest=digest, scores=lambda samples, value=value: [value] * len(samples))
        opened = datasetdm_fast.open_run(run)
        assert bool(curation.count_missing(opened, digest)) == (value < 0.3)
        curation.score_missing(opened, clip, 1)
        scores = datasetdm_fast.open_run(run).ledger.scores("clip")
        assert len(scores) == SAMPLES and {score for _, score in scores} == {min(value, 0.2)}
    ledger = datasetdm_fast.open_run(run).ledger
    for value in (5, 6):
        ledger.add_scores([(7, "distance", value), (1, "distance", 9)])
        assert (
            dict(ledger.scores("distance"))[7]
            == value
            == dict(datasetdm_fast.open_run(run).ledger.scores("distance"))[7]
        )


@pytest.mark.parametrize("where", ["folder", "store"])
def test_a_merged_run_is_a_manifest_that_readers_take_for_a_run(alone, folder, bucket, tmp_path, capsys, where):
    run, out = copy(alone, tmp_path), "memory://bucket/run" if where == "store" else str(tmp_path / "all")
    make(tmp_path / "other", number=7, seed=100)
    assert drop.main([str(run), "00000007", "--quiet"]) == 0
    line = [str(run), str(tmp_path / "other"), str(alone), "--out", out, "--quiet", "--json"]
    assert merge.main([*line, "--dry-run"]) == 0
    for made in (33, 0):
        assert merge.main(line) == 0
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (facts["made"], facts["duplicates"], facts["complete"]) == (made, SAMPLES, True)
    names = shard_place(out).names("manifest")
    assert len(names) == 8 and shard_place(out).names("shards") == [] and audit.main([out, "--quiet"]) == 0
    merged, parts = datasetdm_fast.open_run(out), [datasetdm_fast.open_run(run), datasetdm_fast.open_run(line[1])]
    assert len(merged) == 32 and merged.is_complete
    for sample, part in zip(merged, chain(*parts), strict=True):
        assert (sample.prompt, sample.meta["merged"]["id"]) == (part.prompt, part.id)
        assert (sample.image == part.image).all() and sample.row.labels == part.row.labels
    assert filtering.main([out, "--where", "trust == 1", "--quiet"]) == 0
    assert len(open_data(f"run:{out}", 64, tasks=("semantic",))) > 5
    assert convert.main([out, "--to", "wds", "--kept", "--out", str(tmp_path / "export"), "--quiet"]) == 0
    served = showing.show(out, is_served=True).served
    assert served.fetch("images/00000031.png").read_bytes() == parts[1]["00000001"].read("image")
    far = shard_place("memory://bucket/far")
    for name, content in tree(tmp_path / "other").items():
        far.replace(name, content)
    for place, cause in ((str(folder), "it is a run folder"), (far.name, "names no URL")):
        assert merge.main([str(run), place, "--out", str(tmp_path / "mixed")]) == 2
        assert cause in capsys.readouterr().err
    capsys.readouterr()
    assert drop.main([out, "00000000", "--quiet"]) == 0 and merge.main([*line[:5], *line[6:], "--no-quiet"]) == 0
    assert (
        "complete with 31 samples, 26 left out as their images were there before, nothing to do"
        in capsys.readouterr().err
    )
    (tmp_path / "other" / f".dropped.json.{1 << 40}{10**8}.part").write_bytes(b"")  # of a process that was killed
    assert drop.main([str(tmp_path / "other"), "00000000", "--quiet"]) == 0 and merge.main(line) == 2
    assert "source.1/dropped.json" in capsys.readouterr().err and not list((tmp_path / "other").glob(".*"))
    (run / tar_name(1)).write_bytes(b"")
    assert audit.main([out, "--quiet", "--repair"]) == 4 and shard_place(out).names("manifest") == names
    said = capsys.readouterr()  # the line that merged would bring the shard back as it is
    assert f"/run/{tar_name(1)}: its bytes" in said.out and "taken out" not in said.err and "repair it" in said.out
    entry = json.loads(shard_place(out).read(entry_name(0))) | {"source": {"place": far.name, "shard": 0}}
    shard_place(tmp_path / "other").replace(entry_name(0), json.dumps(entry).encode())
    with pytest.raises(Refused, match="a run in a folder names a URL"):
        datasetdm_fast.open_run(tmp_path / "other")


def test_a_merged_run_that_is_mended_keeps_what_was_dropped_from_it_and_no_half_written_file(alone, tmp_path):
    run, out = copy(alone, tmp_path), tmp_path / "all"
    assert drop.main([str(run), "00000007", "--quiet"]) == 0
    line = [str(run), str(alone), "--out", str(out), "--quiet"]
    assert merge.main(line) == 0 and drop.main([str(out), "00000000", "--quiet"]) == 0
    (out / entry_name(2)).unlink()
    for name in ("run.json", "dropped.json", "manifest/00002.json"):  # of processes that were killed
        path = out / name
        path.with_name(f".{path.name}.{1 << 40}{10**8}.part").write_bytes(b"")
    assert merge.main(line) == 0
    merged = datasetdm_fast.open_run(out)
    assert len(merged) == SAMPLES - 2 and merged[0].id == "00000001" and not list(out.rglob(".*"))


def test_a_page_of_shards_begins_with_its_first_sample_and_ends_with_its_last(alone):
    ledger = SimpleNamespace(row=lambda index, parts: None if index in (5, 8) else alone)
    page = SimpleNamespace(_ledger=ledger)
    assert [showing.ShardPage._indices(page, number, 5) for number in (0, 1)] == [[0, 1, 2, 3, 4], [6, 7, 9]]


@pytest.mark.parametrize("place", ["folder", "store"])
def test_the_page_of_shards_is_made_as_it_is_asked_for(alone, bucket, tmp_path, place, monkeypatch):
    if place == "store":
        for name, content in tree(alone).items():
            bucket.replace(name, content)
    url = "memory://bucket/run" if place == "store" else str(alone)
    if place == "store":  # whose small files are copied, and removed by the process that copied them
        corrections = {7: Correction(ignored=((0, 0, 4, 4),))}
        bucket.replace(CORRECTIONS, format_corrections(corrections))
        store = shard_place(url)
        state = fetch_state(store)
        assert read_corrections(state) == corrections
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: -1)
            del store
            gc.collect()
        assert state.is_dir()
        shutil.rmtree(state.parent)
    shown = showing.show(url, is_served=True)
    served = shown.served
    assert served.command_path == str(url)  # `drop` takes it
    assert (shown.samples, shown.planned) == (SAMPLES, SAMPLES)
    for is_complete in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(showing.Run, "is_complete", is_complete)
            another = showing.show(url, is_served=True)
        told = (another.folder / "gallery/run.js").read_text()
        assert f'"is_in_progress":{"false" if is_complete else "true"}' in told.replace(": ", ":")
        assert not any(json.loads(told.partition(",0,")[2].removesuffix(");\n"))["shown"])  # which the page counts
    page = json.loads(served.fetch("gallery/pages/000000.js").read_text().partition(",0,")[2].removesuffix(");\n"))
    assert page["index"] == list(range(SAMPLES)) and any(page["shown"]) == (place == "folder")
    image = datasetdm_fast.open_run(alone)["00000007"].read("image")
    assert served.fetch("images/00000007.png").read_bytes() == image
    for name in ("gallery/details/000000.js", "gallery/depth/00000007.png"):
        assert served.fetch(name).stat().st_size > 100
    for name in ("images/00000099.png", "gallery/pages/000009.js", "gallery/pages/a.js", "run.json"):
        assert served.fetch(name) is None


def test_open_run_reads_what_a_run_folder_has(alone, folder):
    run, other = datasetdm_fast.open_run(alone), datasetdm_fast.open_run(folder)
    assert [sample.id for sample in run] == [sample.id for sample in other]
    for one, two in zip(run, other):
        assert (one.image == two.image).all() and one.row.labels == two.row.labels and one.trust == two.trust
        assert (one.semantic.labels == two.semantic.labels).all() and one.row.files == two.row.files
    assert len(run.where(classes=("ball",))) == len(other.where(classes=("ball",)))


def test_an_export_has_the_bytes_of_that_of_a_run_folder(alone, folder, tmp_path):
    for name, run in (("a", alone), ("b", folder)):
        assert convert.main([str(run), "--to", "coco,wds", "--out", str(tmp_path / name), "--quiet"]) == 0
    trees = [{k: v for k, v in tree(tmp_path / name).items() if "export.json" not in k} for name in "ab"]
    assert trees[0] == trees[1]


def test_a_part_of_an_export_is_written_to_a_url(alone, bucket, tmp_path, capsys):
    line = [str(alone), "--to", "wds", "--part", "2/2", "--quiet", "--out"]
    assert convert.main([*line, str(tmp_path / "export")]) == 0
    place = shard_place("memory://bucket/export")
    for _ in range(2):  # the second finds it complete
        assert convert.main([*line, place.name]) == 0
        assert {name: place.read(name) for name in place.sizes()} == tree(tmp_path / "export")
        place.replace(".converting/0.json", b"{}")  # as a process leaves it that is killed at its end
    line[4] = "1/2"
    assert convert.main([*line, place.name]) == 2
    assert "memory://bucket/export: it holds" in capsys.readouterr().err
    assert convert.main([*line, "memory://bucket"]) == 2
    assert "it is not empty and not an export" in capsys.readouterr().err


# what is done is noted for two samples of two files each at a time; of wds for each shard
@pytest.mark.parametrize(("layout", "count", "noted"), [("wds", 3, 1), ("coco", 8, 4)])
def test_an_export_in_a_store_goes_on_where_it_was_interrupted(
    alone, bucket, tmp_path, monkeypatch, layout, count, noted
):
    line = [str(alone), "--to", layout, "--shard", "10", "--quiet", "--threads", "1", "--out"]
    assert convert.main([*line, str(tmp_path / "export")]) == 0
    place, written, failures = shard_place("memory://bucket/export"), [], [None] * count + [OSError("503 Slow Down")]
    whole = {name: name for name in tree(tmp_path / "export")}

    def spy(method):
        real = getattr(type(place), method)

        def write(self, name, content):
            if name in whole and name != "export.json":
                if failures and (error := failures.pop(0)):
                    raise Missing(str(error), "Try again.")
                written.append(name)
            return real(self, name, content)

        monkeypatch.setattr(type(place), method, write)

    monkeypatch.setattr(conversion, "BLOCK", 2)
    for method in ("write", "replace"):
        spy(method)
    assert convert.main([*line, place.name]) == 3 and len(written) >= 2
    torn = written[0]
    place.replace(torn, b"torn")
    before = set(written[noted:count])
    written.clear()
    assert convert.main([*line, place.name]) == 0
    assert torn in written and before and not before & set(written)
    names = place.sizes()
    assert {name: place.read(name) for name in names} == tree(tmp_path / "export")


def test_a_stream_reads_every_sample_once_and_resumes(alone):
    run = datasetdm_fast.open_run(alone)
    stream = run.as_dataset("semantic", streaming=True, seed=1)
    plain = [pair[0] for pair in run.as_dataset("semantic")]

    def keys(loader):
        return [next(k for k, each in enumerate(plain) if torch.equal(each, pair[0])) for pair in loader]

    first = keys(stream)
    assert sorted(first) == sorted(keys(plain and run.as_dataset("semantic", streaming=True)))
    assert keys(stream) == first
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(keys(loader)) == sorted(first)
    half = iter(stream)
    for _ in range(11):
        next(half)
    state = stream.state_dict()
    resumed = datasetdm_fast.open_run(alone).as_dataset("semantic", streaming=True, seed=1)
    resumed.load_state_dict(state)
    assert keys(resumed) == first[11:]
    stream.set_epoch(1)
    assert keys(stream) != first


def test_a_stream_counts_what_it_skipped_and_mixes_each_shard_anew():
    stream = ShardStream({0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9]}, {f"{k:08d}": k for k in range(10)}, None)
    stream.load_state_dict({"epoch": 0, "samples": 5})
    samples = iter(stream)
    assert [next(samples), next(samples)] == [5, 6] and stream.state_dict() == {"epoch": 0, "samples": 7}
    stream.load_state_dict({"epoch": 0, "samples": 8})
    assert list(stream) == [8, 9] and stream.state_dict()["samples"] == 10
    one, orders = ShardStream({0: [*range(20)]}, {f"{k:08d}": k for k in range(20)}, 3), []
    for epoch in range(2):
        one.set_epoch(epoch)
        orders.append(list(one))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == [*range(20)]
    one.load_state_dict({"epoch": 0, "samples": 15})
    assert list(one) == orders[0][15:]
    one.load_state_dict({"epoch": 0, "samples": 15})
    one.set_epoch(1)
    assert list(one) == orders[1]


def test_ranks_read_shares_of_their_own(alone, monkeypatch):
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        stream = datasetdm_fast.open_run(alone).as_dataset("semantic", streaming=True, seed=5)
        seen += [index for share in stream._shares() for index in share]
    assert sorted(seen) == list(range(SAMPLES))


def test_ranks_that_no_launcher_started_read_shares_of_their_own(alone, monkeypatch):
    """As of `mp.spawn`: torch.distributed knows them, and the environment does not."""
    seen = []
    for rank in range(2):
        for name, value in {"is_initialized": True, "get_rank": rank, "get_world_size": 2}.items():
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        stream = datasetdm_fast.open_run(alone).as_dataset("semantic", streaming=True)
        seen += [index for share in stream._shares() for index in share]
    assert sorted(seen) == list(range(SAMPLES))


def test_a_store_on_a_disk_is_made_where_it_can_lie(alone, tmp_path, capsys):
    assert generate.main([*LINE, "--store", f"{tmp_path}/run", "--limit", "5"]) == 0
    (tmp_path / "file").touch()
    assert generate.main([*LINE, "--store", f"{tmp_path}/file"]) == 2
    assert f"--store {tmp_path}/file: there is a file of that name, expected a folder" in capsys.readouterr().err
