"""Claims of the parts of a run: who makes which, and what follows a death, a silence or a stop."""

import io
import json
import os
import pickle
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from datasetdm_fast.data import Quarantined, Request
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.document import CLAIMS
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, Row
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder
from datasetdm_fast.runs.workers import claims, spawn
from datasetdm_fast.runs.workers import worker as worker_module
from datasetdm_fast.runs.workers.claims import Claims, claim_name, claims_by_name, free_claims, host, is_over
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.processes import SpawnedProcess
from datasetdm_fast.runs.workers.worker import Callbacks, Worker

pytestmark = pytest.mark.core


@pytest.fixture
def place(tmp_path):
    return ShardFolder(tmp_path)


@pytest.fixture
def clock(monkeypatch):
    """The seconds of the claims, which stand still by themselves."""
    seconds = [1000.0]
    monkeypatch.setattr(claims.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def ended():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_part_is_taken_once_until_it_is_released(place):
    one, other = Claims(place), Claims(place)
    assert one.take_new(3) and not other.take_new(3) and not other.take(3) and other.take_new(4)
    one.release(3)
    assert other.take(3) and other.deaths == {3: 0, 4: 0} and one.deaths == {}


def test_a_part_that_another_takes_while_its_claim_is_looked_for_is_theirs(place, monkeypatch):
    one, other, real = Claims(place), Claims(place), storage.syscall

    def look(*call):
        try:
            return real(*call)
        except FileNotFoundError:
            monkeypatch.setattr(storage, "syscall", real)
            assert other.take_new(3)
            raise

    monkeypatch.setattr(storage, "syscall", look)
    assert not one.take_new(3) and other.deaths == {3: 0}


def test_the_part_of_a_process_that_has_ended_is_taken_over_with_its_deaths(place, ended):
    other = Claims(place, files_of=lambda part: [f"{part}.tar"])
    place.replace(claim_name(3), json.dumps({"host": host(), "process": ended, "deaths": 1}).encode())
    (place.path / f".3.tar.{ended:010}.part").write_bytes(b"half")
    assert not other.take_new(3) and other.take(3) and other.deaths == {3: 2}
    assert json.loads(place.read(claim_name(3)))["process"] == os.getpid()


def test_a_silent_part_is_taken_over_after_the_lease_and_nobody_counts_as_dead(place, clock):
    one, other = Claims(place), Claims(place)
    place.replace(claim_name(3), b'{"deaths": 2}')  # of two that died before
    assert one.take(3) and not other.take(3)
    for _ in range(3):  # as long as the claim is renewed
        clock[0] += claims.LEASE_SECONDS - 1
        one.renew()
        assert not other.take(3)
    clock[0] += claims.LEASE_SECONDS - 1
    assert not other.take(3)
    clock[0] += 2
    assert other.take(3) and other.deaths == {3: 2}


def test_a_process_renews_what_it_makes_and_no_more(place, clock):
    one = Claims(place, "one")
    one.take(3), one.take(4), one.release(4)
    clock[0] += claims.SECONDS_BETWEEN_BEATS - 1
    one.renew()
    assert json.loads(place.read(claim_name(3)))["beats"] == 0
    clock[0] += 2
    one.renew()
    assert json.loads(place.read(claim_name(3)))["beats"] == 1 and place.read(claim_name(4)) is None


def test_a_process_renews_its_claims_at_every_call(place, monkeypatch):
    calls = []
    monkeypatch.setattr(
        worker_module, "make_samples", lambda job, batches, on_unet_call: calls.append(on_unet_call) or ()
    )
    monkeypatch.setattr(worker_module, "BackgroundWriter", lambda folder, on_rows: nullcontext())
    worker = SimpleNamespace(job=SimpleNamespace(plan=None), folder=None, claims=Claims(place, "one"), _on_rows=list)
    worker.gate = SimpleNamespace(check=list)
    assert not Worker._make(worker, []) and calls == [worker.claims.renew]


@pytest.mark.parametrize("died", [False, True])
def test_what_a_process_was_making_is_free_when_it_has_ended(place, died):
    one, other = Claims(place, "one"), Claims(place, "other")
    assert one.take(3) and one.take(5) and other.take(4)
    assert {name: len(each) for name, each in claims_by_name(place).items()} == {"one": 2, "other": 1}
    assert free_claims(place, "one", lambda part: (), died=died) == 2
    is_new = other.take_new(3)
    assert is_new is not died and (is_new or other.take(3)) and other.take(5)
    assert other.deaths == {3: int(died), 4: 0, 5: int(died)}


@pytest.mark.parametrize(
    "content", [b"[1]", b"{", b'{"process": "x"}', b'{"host": "h", "process": 1e9, "deaths": "x"}']
)
def test_a_claim_that_cannot_be_read_is_one_of_a_process_elsewhere(place, clock, content):
    place.replace(claim_name(3), content)
    one = Claims(place)
    assert not one.take(3)
    clock[0] += claims.LEASE_SECONDS + 1
    assert one.take(3) and one.deaths == {3: 0}


def test_other_files_are_no_claims(place):
    place.replace(f"{CLAIMS}/last", b"7")
    assert claims_by_name(place) == {} and free_claims(place, "", lambda part: (), died=True) == 0
    assert place.names(CLAIMS) == ["last"]


@pytest.mark.parametrize("where", ["here", "another machine", "another container"])
def test_a_process_is_looked_for_only_where_its_number_means_that_process(ended, monkeypatch, where):
    """Machines, and the containers of one, may have the same name; in none of them is the other's process."""
    with monkeypatch.context() as elsewhere:
        if where == "another machine":
            elsewhere.setattr(Path, "read_text", lambda path: "another boot")
        if where == "another container":
            elsewhere.setattr(os, "readlink", lambda path: "pid:[1]")
        machine = host()
    assert is_over(machine, ended) == (where == "here") and not is_over(host(), os.getpid())


def test_what_a_living_process_writes_is_no_leftover(tmp_path, ended):
    """Ranks write a claim at the same moment, and whoever takes it removes what the dead had half-written."""
    for process in (os.getppid(), ended, os.getpid()):
        (tmp_path / f".00003.{process}{7:09}.part").touch()
    storage.remove_parts_of([tmp_path / "00003"])
    assert [path.name for path in tmp_path.iterdir()] == [f".00003.{os.getppid()}{7:09}.part"]


class Dying:
    """A run of one place, each of whose processes commits its number of samples and dies."""

    place, is_finishing, places = "run", False, (Place(),)

    def __init__(self, commits, how="dies"):
        self.commits, self.begun, self.new, self.how = commits, 0, 0, how

    def begin(self, rank, name):
        self.new, self.begun = self.commits[self.begun], self.begun + 1
        return SimpleNamespace(ending=lambda: self.how)

    def count_new(self):
        new, self.new = self.new, 0
        return new

    def is_complete(self):
        return self.begun == len(self.commits)

    def claims(self):
        return {}

    def free(self, name, *, died):
        return 1


def test_what_is_missing_in_all_five_processes_is_raised_as_it_is(monkeypatch):
    """Also of a run that has samples, whose other processes might go on without the one."""
    monkeypatch.setattr(spawn, "SECONDS_BETWEEN_POLLS", 0)
    monkeypatch.setattr(spawn, "LONGEST_WAIT", 0)
    for commits, begun in (([0] * 9, 1), ([1] + [0] * 8, 5)):
        run, lost = Dying(commits, Missing("the disk is full", "Make room.")), []
        with pytest.raises(Missing, match="^the disk is full"):
            spawn.Supervisor(run, Callbacks(on_message=lost.append)).work()
        assert run.begun == begun and len(lost) == (begun if begun > 1 else 0)
        assert all("refuses (the disk is full)" in line for line in lost)


def test_a_stop_lets_processes_finish_what_they_make_and_ends_the_others(monkeypatch):
    monkeypatch.setattr(spawn, "SECONDS_BETWEEN_POLLS", 0)
    told, looks = [], iter(range(100))

    def process(name):
        ended = []
        return SimpleNamespace(
            ending=lambda: "" if ended else next(looks) and None,
            stop=lambda: told.append(f"stop {name}") or (name == "busy" and ended.append(1)),
            kill=lambda: told.append(f"kill {name}") or ended.append(1),
        )

    run = SimpleNamespace(
        place="run",
        is_finishing=spawn.SharedFolder.is_finishing,
        places=(Place(), Place()),
        is_complete=lambda: False,
        count_new=lambda: 0,
        claims=lambda: {"of busy": [b"1"]},
        free=lambda name, *, died: 0,
    )
    watched = spawn.Supervisor(run, Callbacks(is_stopping=lambda: True))
    for rank, name in zip(watched.ranks, ("busy", "idle"), strict=True):
        rank.process, rank.name = process(name), f"of {name}"
    watched.work()
    assert told == ["stop busy", "stop idle", "kill idle"] and not watched._running()


def test_the_batch_whose_rows_are_written_is_released_and_only_those_of_the_data_set_are_counted():
    released, counted = [], []
    worker = SimpleNamespace(
        made=2,
        claims=SimpleNamespace(release=released.append),
        callbacks=Callbacks(on_commit=counted.append),
        job=SimpleNamespace(plan=SimpleNamespace(batch_size=4)),
    )
    rows = [Row(Request(index, "a ball", 0), {}, status=status) for index, status in ((11, DONE), (9, DOUBTFUL))]
    Worker._on_rows(worker, rows)
    assert (worker.made, released, counted) == (4, [2], [1])


def test_a_batch_that_others_have_made_is_not_kept(place):
    looks = [True, False, True, True, True, False]
    worker = SimpleNamespace(callbacks=Callbacks(), claims=Claims(place), _is_missing=lambda *_: looks.pop(0))
    assert list(Worker._claim_new(worker, {3: {0}, 4: {1}})) == [4]
    other = Claims(place)
    assert other.take_new(3) and not other.take_new(4)
    assert not Worker._retry(worker, {7: {2}}) and other.take_new(7)
    one = Claims(place)
    assert one.take_new(6)
    quota = SimpleNamespace(take=lambda results: results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module, "Quota", lambda *_: quota)
        job = SimpleNamespace(plan=SimpleNamespace(batch_size=1))
        late = SimpleNamespace(
            job=job, folder=SimpleNamespace(ledger=None), last=5, claims=one, _range=lambda batch: ()
        )
        Worker._put(late, None, 6, [Quarantined(Request(6, "a ball", 6), "NaN")])  # beyond the last of --limit
    assert other.take_new(6)
    stopping = SimpleNamespace(callbacks=Callbacks(is_stopping=lambda: True))
    assert list(Worker._claim_new(stopping, {5: {2}})) == []


def test_how_a_process_ended_is_told_by_its_code_or_what_it_refused():
    def ended(code, content=b""):
        return SpawnedProcess.ending(SimpleNamespace(poll=lambda: code, stdout=io.BytesIO(content)))

    assert ended(None) is None and ended(0) == "" and ended(3) == "ended with exit code 3"
    assert [ended(-number) for number in (1, 9, 15)] == [f"was ended by SIG{name}" for name in ("HUP", "KILL", "TERM")]
    refused = ended(2, pickle.dumps(Refused("it is bad", "Mend it.")))
    assert isinstance(refused, Refused) and (refused.cause, refused.remedy) == ("it is bad", "Mend it.")


def test_a_process_of_shards_has_its_rank_among_all_places(monkeypatch):
    monkeypatch.setattr(spawn, "start_process", lambda place, *more: (place, more[-1]))
    shards, places = object.__new__(spawn.SharedShards), (Place(), Place(threads=2), Place())
    shards.places, shards.place, shards._spec, shards._on_start = places, "run", None, print
    place, rank = shards.begin(1, "second")
    assert place is places[1] and (rank.rank, rank.world, rank.name) == (1, 3, "second")


def test_a_death_counts_for_a_batch_and_not_for_a_shard(tmp_path):
    folder, shards = object.__new__(spawn.SharedFolder), object.__new__(spawn.SharedShards)
    folder._state = place = ShardFolder(tmp_path)
    shards._ledger = SimpleNamespace(place=place)
    for run, deaths in ((folder, 1), (shards, 0)):
        assert (
            Claims(place, "one").take_new(3) and run.free("other", died=True) == 0 and run.free("one", died=True) == 1
        )
        assert (next_one := Claims(place, "two")).take(3) and next_one.deaths == {3: deaths}
        next_one.release(3)


@pytest.mark.parametrize(("deaths", "is_made"), [(0, True), (2, True), (3, False), (4, False)])
def test_a_batch_is_made_once_more_until_three_processes_died_with_it(tmp_path, deaths, is_made):
    made, put = [], []
    requests = [Request(index, "a ball", index) for index in (8, 9)]
    worker = SimpleNamespace(
        _is_missing=lambda *_: True,
        claims=SimpleNamespace(take=lambda batch: batch == 4, deaths={4: deaths}),
        _make=lambda batches: made.extend(batches) or True,
        job=SimpleNamespace(plan=SimpleNamespace(batch=lambda batch: SimpleNamespace(requests=requests))),
        folder=SimpleNamespace(path=tmp_path),
        _on_rows=None,
        _put=lambda writer, batch, results: put.append((batch, results)),
    )
    assert Worker._retry(worker, {3: {6}, 4: {8, 9}}) and not Worker._retry(worker, {3: {6}})
    reason = "3 processes ended while they made its batch"
    quarantined = [(4, [Quarantined(request, reason) for request in requests])]
    assert (made, put) == (([4], []) if is_made else ([], quarantined))


@pytest.mark.parametrize(("commits", "begun"), [([0] * 12, 5), ([0] * 4 + [1] + [0] * 7, 9), ([0, 0, 2] * 4, 12)])
def test_a_place_stays_empty_after_five_deaths_in_a_row_without_progress(monkeypatch, commits, begun):
    seconds, run = [0.0], Dying(commits)
    clock = SimpleNamespace(monotonic=lambda: seconds[0], sleep=lambda wait: seconds.append(seconds.pop() + wait))
    monkeypatch.setattr(spawn, "time", clock)
    with nullcontext() if begun == len(commits) else pytest.raises(Missing, match="ended 5 times in a row .dies"):
        spawn.Supervisor(run, Callbacks()).work()
    assert run.begun == begun


def test_the_first_death_costs_no_wait_and_each_one_after_it_twice_as_much_and_a_second(monkeypatch):
    monkeypatch.setattr(spawn, "time", SimpleNamespace(monotonic=lambda: 100.0))
    watched = spawn.Supervisor(Dying([]), Callbacks())
    waits = []
    for _ in range(5):
        assert not watched.ranks[0].is_over
        watched._note_death(0, watched.ranks[0], "dies")
        waits.append(watched.ranks[0].next_start - 100)
    assert waits == [0, 1, 3, 7, 15] and watched.ranks[0].is_over
