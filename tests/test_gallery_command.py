"""The command gallery and its server: what is given out, to whom, and what a page of a run in progress holds."""

import errno
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rendered import document, rendered, write_run

from datasetdm_fast import audit as audit_command
from datasetdm_fast import convert, drop, open_run
from datasetdm_fast import gallery as command
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.gallery import review, server
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder import shard_places
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.folder import PAGE, RunFolder, is_sealed

pytestmark = pytest.mark.loopback


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "a run"
    write_run(path, 3, 32)
    (path.parent / "secret.png").write_bytes(b"secret")
    for name in ("images/.hidden.png", "state/shown.png", "images/shown.txt"):
        (path / name).write_bytes(b"secret")
    (path / "images" / "link.png").symlink_to(path.parent / "secret.png")
    return path


@contextmanager
def asking(served):
    """Status, headers and body of an answer of a server of a run."""
    with server.open_server(served, 18800, print) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()

        def ask(path, method="GET", body=None, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=20)
            host = {"Host": f"127.0.0.1:{serving.server_port}"}
            connection.request(method, path, body, {**host, **{k.replace("_", "-"): v for k, v in headers.items()}})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

        ask.port = serving.server_port
        try:
            yield ask
        finally:
            serving.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def ask(run):
    with asking(server.ServedRun.of_folder(run)) as ask:
        yield ask


HOME = "/a%20run/"


def test_files_are_served_once(run, ask):
    content = (run / "images" / "00000001.png").read_bytes()
    path = f"{HOME}images/00000001.png"
    status, headers, body = ask(path)
    assert (status, body, headers["Content-Type"]) == (200, content, "image/png")
    assert ask(path, "HEAD")[0] == 200 and ask(path, "HEAD")[2] == b""
    assert ask(path, If_Modified_Since=headers["Last-Modified"])[0] == 304


def test_small_files_wait_for_no_acknowledgement(run, monkeypatch):
    """The head of an answer is sent before its file, which would wait 40 ms for the browser to have seen that."""
    options, finish = [], server.Handler.finish

    def note(handler):
        options.append(handler.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        finish(handler)

    monkeypatch.setattr(server.Handler, "finish", note)
    with asking(server.ServedRun.of_folder(run)) as ask:
        assert ask(f"{HOME}images/00000001.png")[0] == 200
        wait_until(lambda: options)
    assert all(options)


def test_the_page_may_run_nothing_but_its_own_scripts(ask):
    status, headers, body = ask(f"{HOME}gallery/index.html")
    policy = headers["Content-Security-Policy"]
    assert status == 200 and b"<script src=" in body and "script-src 'self';" in policy and "unsafe" not in policy
    assert "default-src 'none'" in policy and headers["X-Content-Type-Options"] == "nosniff"
    assert ask("/")[0] == 302 and ask("/")[1]["Location"] == f"{HOME}gallery/index.html"


@pytest.mark.parametrize(
    "path",
    [
        *("gallery/", "images", "images/", "state/ledger.sqlite", "run.json", "samples.jsonl", "review/bad.txt"),
        *(
            "images/../state/seal.json",
            "images/%2e%2e/%2e%2e/secret.png",
            "images/..%2f..%2fsecret.png",
            "images//a.png",
        ),
        *(
            "state/shown.png",
            "images/shown.txt",
            "images/link.png",
            "images/00000001.png%00",
            "images/none.png",
            "images/.hidden.png",
            "../secret.png",
            "etc",
        ),
        "images/..%5c..%5csecret.png",
    ],
)
def test_nothing_else_is_given_out(ask, path):
    assert ask(HOME + path)[0] == 404 and ask("/" + path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "", "localhost.evil.example:80"])
def test_other_names_of_this_machine_are_refused(ask, host):
    for method in ("GET", "HEAD", "PUT"):
        status, _, body = ask(f"{HOME}gallery/index.html", method, Host=host)
        assert status in (400, 403) and b"<" not in body
    assert ask(f"{HOME}gallery/run.js", Host=f"localhost:{ask.port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(ask, method):
    status, headers, body = ask(f"{HOME}gallery/index.html", method)
    assert (status, headers["Allow"], body) == (405, "GET, HEAD, PUT", b"")


def test_marks_come_from_the_page_alone(run, ask):
    own, body = f"http://127.0.0.1:{ask.port}", json.dumps({"marks": [["00000001", "bad"], ["00000002", "good"]]})
    shutil.rmtree(run / "review", ignore_errors=True)  # of another test of this run
    for origin in ("http://evil.example", "null", "", f"https://127.0.0.1:{ask.port}"):
        assert ask(f"{HOME}review", "PUT", body, Origin=origin)[0] == 403
    assert ask(f"{HOME}review", "PUT", body)[0] == 403 and not (run / "review").exists()
    for wrong in ("", "[]", "{}", '{"marks": [["../x", "bad"]]}', '{"marks": [["00000001", "worse"]]}', '{"marks": 1}'):
        assert ask(f"{HOME}review", "PUT", wrong, Origin=own)[0] == 400
    assert ask(f"{HOME}images/00000001.png", "PUT", body, Origin=own)[0] == 404
    assert ask(f"{HOME}review", "PUT", Origin=own, Content_Length=str(server.LARGEST_REQUEST + 1))[0] == 413
    assert ask(f"{HOME}review", "PUT", body.ljust(server.LARGEST_REQUEST), Origin=own)[0] == 204
    assert ask(f"{HOME}review", "PUT", '{"marks": [["00000000", "bad"], ["00000002", ""]]}', Origin=own)[0] == 204
    assert (run / "review" / "bad.txt").read_text() == "00000000\n00000001\n"
    assert (run / "review" / "good.txt").read_text() == "" and review.Review(run).read()["00000001"] == "bad"
    told = json.loads(ask(f"{HOME}review")[2])
    assert told == {
        "path": str(run.resolve()),
        "marks": [["00000000", "bad"], ["00000001", "bad"]],
        "against": "",
        "corrections": {},
    }


def test_corrections_come_from_the_page_by_the_ids_of_samples(tmp_path):
    (folder := tmp_path / "run").mkdir()
    change = {"ignored": [[0, 0, 4, 4]]}
    with asking(server.ServedRun.of_folder(folder)) as ask:

        def put(corrections):
            body = json.dumps({"marks": [], "corrections": corrections})
            return ask("/run/review", "PUT", body, Origin=f"http://127.0.0.1:{ask.port}")[0]

        for wrong in (
            [],
            {"../x": change},
            {"1": change},
            {"٠٠٠٠٠٠٠١": change},
            {"00000001": {"ignored": [[4, 0, 0, 4]]}},
        ):
            assert put(wrong) == 400 and not (folder / "review").exists()
        assert put({"00000001": change}) == 204 == put({"00000002": change})
        assert json.loads(ask("/run/review")[2])["corrections"] == {"00000001": change, "00000002": change}
        assert put({"00000001": {}}) == 204
        assert json.loads(ask("/run/review")[2])["corrections"] == {"00000002": change}


def test_corrections_of_one_sample_by_two_reviewers_are_both_kept(tmp_path):
    (folder := tmp_path / "run").mkdir()
    first, second = {"removed": [["instance", 0]], "ignored": [[0, 0, 4, 4]]}, {"renamed": [["instance", 1, "ring"]]}
    with asking(server.ServedRun.of_folder(folder)) as ask:

        def put(change, before):
            body = json.dumps({"marks": [], "corrections": {"00000001": change}, "before": {"00000001": before}})
            assert ask("/run/review", "PUT", body, Origin=f"http://127.0.0.1:{ask.port}")[0] == 204
            return json.loads(ask("/run/review")[2])["corrections"].get("00000001", {})

        assert put(first, {}) == first
        assert put(second, {}) == {**first, **second}  # by somebody who has not seen the first
        assert put(second, {}) == {**first, **second}  # sent again, as the answer was lost
        assert put({}, first) == second  # the first takes theirs back
        other = {"renamed": [["instance", 1, "cube"]]}
        assert put(other, {}) == other and put({}, other) == {}  # the last class that was given to an instance
        for wrong in ([], {"00000001": {"ignored": [[4, 0, 0, 4]]}}):
            body = json.dumps({"marks": [], "corrections": {}, "before": wrong})
            assert ask("/run/review", "PUT", body, Origin=f"http://127.0.0.1:{ask.port}")[0] == 400


def test_browsers_find_no_icon_and_other_errors_of_a_server_are_printed(ask, capsys):
    assert ask("/favicon.ico")[0] == 204
    for error, is_printed in ((ConnectionResetError("gone"), False), (TimeoutError(), False), (KeyError("x"), True)):
        try:
            raise error
        except Exception:
            server.RunServer.__new__(server.RunServer).handle_error(None, ("127.0.0.1", 1))
        assert ("Traceback" in capsys.readouterr().err) == is_printed


def test_files_of_a_store_are_fetched_and_a_store_that_is_silent_is_told(run, tmp_path):
    def fetch(name):
        if name.endswith("silent.png"):
            raise Missing("the store does not answer", "Ask again.")
        return run / "images/00000001.png" if name == "images/stored.png" else None

    (tmp_path / "run").mkdir()
    with asking(replace(server.ServedRun.of_folder(tmp_path / "run"), fetch=fetch)) as ask:
        for name, status in (("stored.png", 200), ("none.png", 404), ("silent.png", 502), ("stored.exe", 404)):
            assert ask(f"/run/images/{name}")[0] == status, name


@pytest.mark.parametrize(
    ("number", "told", "tried"),
    [(errno.EADDRINUSE, "are in use", server.TRIED_PORTS), (errno.EACCES, "are in use", server.TRIED_PORTS)]
    + [(errno.ENOBUFS, "127.0.0.1:18800: No buffer space", 1)],
)
def test_no_free_port_is_missing_and_another_error_ends_the_search(monkeypatch, number, told, tried):
    ports = []

    def refuse(run, port, against):
        ports.append(port)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(server, "RunServer", refuse)
    with pytest.raises(Missing, match=told) as stop:
        server.open_server(None, 18800, print)
    assert ports == list(range(18800, 18800 + tried)) and "--port" in stop.value.remedy


def test_a_sample_in_both_lists_of_a_review_is_bad(tmp_path):
    (tmp_path / "review").mkdir()
    for mark, ids in {"good": "00000001\n00000002\n", "bad": "00000002\nx\n"}.items():
        (tmp_path / f"review/{mark}.txt").write_text(ids)
    assert review.Review(tmp_path).read() == {"00000001": "good", "00000002": "bad"}


def test_no_mark_is_lost_where_two_reviewers_serve_the_same_run(tmp_path):
    code = "import sys\nfrom pathlib import Path\nfrom datasetdm_fast.runs.gallery import review\n"
    code += "marks = review.Review(Path(sys.argv[1]))\n"
    code += "for k in range(100):\n    marks.change({f'{2 * k + int(sys.argv[2]):08}': 'bad'})"
    line = [sys.executable, "-c", code, str(tmp_path)]
    assert [one.wait() for one in [subprocess.Popen([*line, number]) for number in "01"]] == [0, 0]
    assert sorted(review.Review(tmp_path).read()) == [f"{k:08}" for k in range(200)]


def test_what_cannot_be_answered_is_no_error_on_the_screen(run, ask, capsys):
    with socket.create_connection(("127.0.0.1", ask.port), timeout=20) as connection:
        connection.sendall(f"GET http://[ HTTP/1.1\r\nHost: 127.0.0.1:{ask.port}\r\n\r\n".encode())
        assert b"404" in connection.recv(100)
    bad = run / "review" / "bad.txt"
    kept = bad.read_bytes() if bad.exists() else b""
    bad.unlink(missing_ok=True)
    bad.mkdir(parents=True)
    assert ask(f"{HOME}review")[0] == 500
    bad.rmdir()
    bad.write_bytes(kept)
    assert ask(f"{HOME}review")[0] == 200 and capsys.readouterr().err == ""


def test_a_run_folder_whose_name_is_no_utf_8_is_served(tmp_path):
    folder = tmp_path / os.fsdecode(b"b\xffd")
    folder.mkdir()
    with server.open_server(server.ServedRun.of_folder(folder), 18800, print) as serving:
        assert serving.address.endswith("/b%EF%BF%BDd/gallery/index.html")


def test_a_run_whose_folder_is_called_against_is_compared_with_another(tmp_path):
    shown, other = (tmp_path / name for name in ("against", "gallery"))
    for folder in (shown, other):
        (folder / "gallery").mkdir(parents=True)
        (folder / "gallery" / "run.js").write_text(folder.name)
    with server.open_server(
        server.ServedRun.of_folder(shown), 18800, print, server.ServedRun.of_folder(other)
    ) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        for prefix, name in ((serving.prefix, "against"), (serving.against, "gallery")):
            connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=20)
            connection.request("GET", f"{prefix}gallery/run.js")
            assert connection.getresponse().read().decode() == name
        serving.shutdown()


def test_marks_of_a_run_that_was_moved_away_are_not_written(run, ask):
    moved, own = run.with_name("moved"), f"http://127.0.0.1:{ask.port}"
    run.rename(moved)
    try:
        assert ask(f"{HOME}review", "PUT", '{"marks": [["00000001", "bad"]]}', Origin=own)[0] == 507
        assert not run.exists()
    finally:
        moved.rename(run)


def test_the_usual_port_is_not_said_by_browsers():
    names = {"127.0.0.1", "localhost", "[::1]"}
    assert server.hosts_of(80) == names | {"127.0.0.1:80", "localhost:80", "[::1]:80"}
    assert server.hosts_of(8765) == {"127.0.0.1:8765", "localhost:8765", "[::1]:8765"}


def test_a_taken_port_is_said_and_the_next_one_serves(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = []
        with server.open_server(server.ServedRun.of_folder(run), port, said.append) as serving:
            assert serving.server_port > port and said == [f"port {port} is taken, so it is {serving.server_port}"]
            assert serving.server_address[0] == "127.0.0.1" and f":{serving.server_port}/a%20run/" in serving.address


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the port of a server that has ended")
def test_a_page_that_is_still_open_finds_its_server_again(run):
    with server.open_server(server.ServedRun.of_folder(run), 8765, print) as serving:
        thread, port = threading.Thread(target=serving.serve_forever), serving.server_port
        thread.start()
        with socket.create_connection(("127.0.0.1", port)) as page:
            page.sendall(f"GET /favicon.ico HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode())
            while page.recv(1000):
                pass  # the server has closed it, whose port then waits for a minute
        serving.shutdown()
        thread.join()
    with server.open_server(server.ServedRun.of_folder(run), port, print) as again:
        assert again.server_port == port


def test_a_run_in_progress_has_a_page_and_is_not_disturbed(tmp_path, capsys):
    path = tmp_path / "run"
    with RunFolder(path, document(6, 32)) as folder:
        folder.add([rendered(k, 32) for k in range(4)], {})
        assert command.main([str(path)]) == 0
        told = capsys.readouterr()
        assert told.out == f"{path / PAGE}\n" and "4 of 6 samples" in told.err
        assert (path / "samples.jsonl").read_text().count("\n") == 4 and not is_sealed(path)
        assert '"planned":6' in (path / "gallery/run.js").read_text() and "4 of 6 images" in card(path)
        folder.add([rendered(k, 32) for k in range(4, 6)], {})
        finish_run(folder)
    write_run(tmp_path / "other", 6, 32)
    assert {p: (tmp_path / "other" / p).read_bytes() for p in names(tmp_path / "other")} == {
        p: (path / p).read_bytes() for p in names(path)
    }
    before = {p: (path / p).stat().st_mtime_ns for p in names(path)}
    assert command.main([str(path), "--quiet"]) == 0 and audit(path).findings == []
    assert {p: (path / p).stat().st_mtime_ns for p in names(path)} == before


def card(path):
    return (path / "README.md").read_text() if (path / "README.md").exists() else ""


def wait_until(is_so):
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stopped_run_is_shown_with_what_it_has(tmp_path, capsys):
    path = tmp_path / "run"
    with RunFolder(path, document(6, 32)) as folder:
        folder.add([rendered(k, 32) for k in range(4)], {})
    assert command.main([str(path)]) == 0 and (path / PAGE).exists() and audit(path).findings == []
    assert "4 of 6 samples" in capsys.readouterr().err


@pytest.mark.parametrize("is_busy", [False, True])
def test_rows_that_do_not_fit_are_refused_in_one_sentence(tmp_path, capsys, is_busy):
    path = tmp_path / "run"
    with RunFolder(path, document(2, 32)) as folder:
        row = folder.write([rendered(0, 32)], {})[0]
        folder.ledger.commit([replace(row, labels=row.labels | {"instance": [{}]}, tracings={})])
        if is_busy:
            assert command.main([str(path)]) == 2
    if not is_busy:
        assert command.main([str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "its rows do not fit run.json" in lines[0] and "audit" in lines[1]


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and "state" not in p.parts)


@pytest.fixture
def bucket(monkeypatch):
    """What fsspec offers in place of a bucket, in memory, with its URL."""
    import fsspec

    monkeypatch.setattr(shard_places.ShardBucket, "_protocols", ("bucket",))
    there = fsspec.filesystem("memory", use_listings_cache=False)  # as ours are opened
    yield SimpleNamespace(url="memory://bucket/my run", root="/bucket/my run", files=there)
    if there.exists("/bucket"):
        there.rm("/bucket", recursive=True)


def test_a_run_folder_in_a_store_is_refused_where_runs_are_read(run, bucket, tmp_path, capsys):
    for said in ("holds no run.json, so it is not a run", "it is a run folder, and a store is read only in shards"):
        for line in (
            (command, "--serve"),
            (audit_command,),
            (convert, "--to", "nyu", "--out", str(tmp_path / "nyu")),
            (drop, "00000001"),
        ):
            assert line[0].main([bucket.url, *line[1:]]) == 2
            assert f"{bucket.url}: {said}" in capsys.readouterr().err
        with pytest.raises(Refused, match=said):
            open_run(bucket.url)
        bucket.files.pipe_file(f"{bucket.root}/run.json", (run / "run.json").read_bytes())


def test_marks_of_a_review_in_a_store_lie_there(bucket):
    bucket.files.pipe_file(f"{bucket.root}/review/bad.txt", b"00000000\n")  # of somebody else
    review.Review(bucket.url).change({"00000001": "bad"})
    assert review.Review(bucket.url).read() == {"00000000": "bad", "00000001": "bad"}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_served_page_without_a_word(run, monkeypatch, capsys, number, code):
    monkeypatch.setattr(server.RunServer, "serve_forever", lambda serving: signal.raise_signal(number))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        assert command.main([str(run), "--serve", "--port", "18840", "--quiet"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == ""


def test_samples_that_are_set_aside_are_counted_apart(tmp_path, capsys):
    run = tmp_path / "run"
    with RunFolder(run, document(2, 32)) as folder:
        folder.add([rendered(0, 32), *(replace(rendered(k, 32), rejection="it is blurred") for k in (1, 2, 3))], {})
        finish_run(folder)
    assert command.main([str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == f"{run}: 1 of 2 samples, and 3 set aside\n" and json.loads(out)["samples"] == 1


def test_a_store_on_a_disk_is_a_folder(run, tmp_path, capsys):
    assert command.main([f"file://{run}", "--quiet"]) == 0 and capsys.readouterr().out == f"{run / PAGE}\n"
    for name in ("a::run", "zip::run"):  # which join file systems in other URLs
        named = shutil.copytree(run, tmp_path / name)
        assert command.main([f"file://{named}", "--quiet"]) == 0 and capsys.readouterr().out == f"{named / PAGE}\n"
        assert len(open_run(f"file://{named}")) == len(open_run(run))


@pytest.mark.parametrize(
    "line, said",
    [
        ([], "RUN is missing"),
        (["nowhere"], "nowhere: holds no run.json"),
        (["nowhere", "--port", "0"], "--port 0"),
        (["nowhere", "--against", "other"], "--against: a page that is opened from disk"),
        (["other"], "other: holds no run.json"),
        (["other/file"], "other/file: holds no run.json"),
        (["empty"], "empty: no sample is committed yet"),
        (["file:///nowhere/run"], "/nowhere/run: holds no run.json"),
        (["nothing://bucket/run", "--serve"], "Protocol not known"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, line, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "state").mkdir(parents=True)
    (tmp_path / "empty" / "run.json").write_text(json.dumps(document(1, 32)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    assert command.main(line) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and said in lines[0] and "another --out" not in lines[1]
