"""Runs in shards in an S3 store over HTTP: moto's server, which answers slowly, with 503, or that a token has expired
where a test asks for it.
"""

from __future__ import annotations

import random
import threading
import time

import pytest
import torchless
import troubled
from skips import long_test
from test_ranks import tree
from test_shards import LINE, SAMPLES, contents, describe, make, spec_of

import datasetdm_fast
from datasetdm_fast import audit, drop, gallery, generate
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder, shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger, entry_name, index_name, tar_name
from datasetdm_fast.runs.workers import spawn
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.worker import Callbacks

for library in ("moto", "flask", "s3fs"):
    pytest.importorskip(library, reason="moto and s3fs are not installed")
pytestmark = pytest.mark.loopback

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class TroubledStore:
    """An application in front of moto's; `trouble` gets the method and the path of a request, and gives the status and
    body of an answer in its place.
    """

    def __init__(self, store):
        self.store, self.trouble = store, lambda method, path: None

    def __call__(self, environ, start_response):
        answer = self.trouble(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if answer is None:
            return self.store(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(answer[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(answer[1])))])
        return [answer[1]]


@pytest.fixture(scope="module", autouse=True)
def arithmetic():
    with pytest.MonkeyPatch.context() as patch:
        torchless.install(patch.setattr)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a single process on a disk."""
    out = tmp_path_factory.mktemp("alone") / "run"
    make(out)
    return out


@pytest.fixture
def store(monkeypatch):
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    troubled_store = TroubledStore(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, troubled_store, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield troubled_store
    troubled_store.trouble = lambda method, path: None
    files.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()


URL = "s3://bucket/run"


@long_test
def test_kills_and_503_and_slow_answers_change_no_byte(alone, store, monkeypatch):
    dice, started, begin = random.Random(0), [], spawn.start_process

    def trouble(method, path):
        time.sleep(0.05 * (dice.random() < 0.1))
        return ("503 Slow Down", BUSY) if dice.random() < 0.1 else None

    def start(*arguments, **options):
        started.append(begin(*arguments, **options))
        return started[-1]

    def kill():
        for _ in range(3):
            time.sleep(dice.uniform(2.0, 4.0))
            running = [process for process in started if process.poll() is None]
            if running:
                dice.choice(running).kill()

    monkeypatch.setattr(spawn, "start_process", start)
    store.trouble = trouble
    killer = threading.Thread(target=kill)
    killer.start()
    places = [Place({"OMP_NUM_THREADS": "1", troubled.SECONDS: "0.3"}, 1)] * 2
    ledger = ShardLedger(shard_place(URL))
    spawn.run_ranks(places, spec_of(URL), ledger, Callbacks(describe, on_start=troubled.install))
    killer.join()
    make(URL)
    store.trouble = lambda method, path: None
    assert contents(shard_place(URL)) == contents(ShardFolder(alone))
    assert len(datasetdm_fast.open_run(URL)) == SAMPLES and audit.main([URL, "--quiet"]) == 0


@long_test
def test_an_expired_token_and_a_store_that_stays_busy_end_in_a_sentence_and_the_run_resumes(alone, store, capsys):
    for status, body, told in (("400 Bad Request", EXPIRED, "expired"), ("503 Slow Down", BUSY, "reduce your")):
        made = []
        store.trouble = lambda method, path, status=status, body=body, made=made: (
            (status, body) if len(made) >= 2 and method == "PUT" and not made.append(1) else count(made, method, path)
        )
        line = [*LINE, "--store", URL]
        assert generate.main(line) == 3
        errors = capsys.readouterr().err.splitlines()
        assert told in errors[-2] and len(errors) == 2, errors
    store.trouble = lambda method, path: None
    assert generate.main([*LINE, "--store", URL]) == 0
    assert contents(shard_place(URL)) == contents(ShardFolder(alone))


def count(made, method, path):
    """Notes each shard that was written."""
    if method == "PUT" and "/manifest/" in path:
        made.append(1)


@pytest.mark.parametrize("damage", ["torn", "entry without its shard"])
def test_damage_in_the_store_is_named_and_repaired_to_the_same_bytes(alone, store, capsys, damage):
    place = shard_place(URL)
    for name, content in tree(alone).items():
        place.replace(name, content)
    if damage == "torn":
        place.replace(tar_name(2), (alone / tar_name(2)).read_bytes()[:5000])
    else:
        place.remove(tar_name(2))
        place.remove(index_name(2))
    assert audit.main([URL, "--quiet", "--repair"]) == 4
    assert "00002" in capsys.readouterr().out and place.read(entry_name(2)) is None
    make(URL)
    assert contents(place) == contents(ShardFolder(alone)) and audit.main([URL, "--quiet"]) == 0


def test_selections_are_written_into_the_store(alone, store, capsys):
    place = shard_place(URL)
    for name, content in tree(alone).items():
        place.replace(name, content)
    assert drop.main([URL, "00000003", "--quiet"]) == 0 and len(datasetdm_fast.open_run(URL)) == SAMPLES - 1
    assert gallery.main([URL]) == 2 and "Add --serve" in capsys.readouterr().err
    with pytest.raises(Refused, match="s3://no-such-bucket/run: holds no run.json"):
        datasetdm_fast.open_run("s3://no-such-bucket/run")
