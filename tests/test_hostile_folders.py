"""Run folders and engine folders of a stranger: every command that opens one ends in one sentence, and in time."""

import json
import os
import re
import shutil
import signal
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from rendered import write_run

from datasetdm_fast import audit, convert, generate, verify
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export import __main__ as export
from datasetdm_fast.export.manifest import NAME as MANIFEST
from datasetdm_fast.export.manifest import Manifest
from datasetdm_fast.runs.run_folder.document import DOCUMENT, LEDGER, engines_of
from datasetdm_fast.runs.run_folder.folder import SEAL
from datasetdm_fast.runs.run_folder.reader import open_run

NUMBER = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "run"
    write_run(path, NUMBER)
    return path


@contextmanager
def in_time(seconds: int = 60):
    """Fails what hangs, such as the opening of a pipe that nobody writes to."""

    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def put(content):
    """The file with this content instead."""

    def damage(path: Path):
        path.unlink()
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return damage


def edit(**values):
    """The JSON file with some of its values replaced."""

    def damage(path: Path):
        put(json.loads(path.read_text()) | values)(path)

    return damage


def folder(path: Path):
    path.unlink()
    path.mkdir()


def pipe(path: Path):
    path.unlink()
    os.mkfifo(path)


def link(target: str):
    def damage(path: Path):
        path.unlink()
        path.symlink_to(target)

    return damage


def statement(*lines: str):
    """The database after these statements."""

    def damage(path: Path):
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for line in lines:
                connection.execute(line)

    return damage


PLACES = {
    "a folder": folder,
    "a pipe": pipe,
    "a loop": link(DOCUMENT),
    "a link to nothing": link("nothing"),
    "a link that never ends": link("/dev/zero"),
    "empty": put(b""),
}
DOCUMENTS = PLACES | {
    "brackets": put(b"[" * 10_000_000),
    "few brackets": put(b"[" * 100_000),
    "no text": put(b"\xff\xfe\x00"),
    "a list": put([1]),
    "a large number": put(b'{"format": ' + b"9" * 100_000 + b"}"),
    "an exponent": put(b'{"format": 1e999}'),
    "NaN": put(b'{"format": NaN}'),
    "twice": put(b'{"format": 1, "format": 1}'),
    "text for tasks": edit(config={"task": "semantic", "image_format": "png", "sampler": "pndm", "seed": 0}),
    "an unknown task": edit(config={"task": ["x"], "image_format": "png", "sampler": "pndm", "seed": 0}),
    "a label many times": edit(
        config={"task": ["semantic"] * 100_000, "image_format": "png", "sampler": "pndm", "seed": 0}
    ),
    "no plan": edit(plan=None),
    "a huge plan": edit(plan={"number": 10**30, "batch_size": 4}),
    "a huge size": edit(sampling={"size": 10**9, "steps": 50, "calls": 51, "guidance": 3.0}),
    "true for a number": edit(plan={"number": True, "batch_size": 4}),
    "labels of none": edit(labels={}),
    "decoders of a list": edit(decoders=["semantic"]),
}
LEDGERS = PLACES | {
    "no database": put(b"SQLite format 3\0" + bytes(4096)),
    "text": put(b"not a database" * 100),
    "another table": statement("DROP TABLE samples", "CREATE TABLE other (x)"),
    "no notes": statement("DROP TABLE notes"),
    "a view": statement(
        "DROP TABLE samples",
        "CREATE VIEW samples AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x FROM c",
    ),
    "other columns": statement("DROP TABLE samples", "CREATE TABLE samples (x)"),
    "wrong types": statement(
        "UPDATE samples SET files = '[]', labels = '3', recipe = 'null'",
    ),
    "files elsewhere": statement("""UPDATE samples SET files = json_set(files, '$.image[2]', '../../1.png')"""),
    "deep": statement(f"UPDATE samples SET labels = '{'[' * 100_000}'"),
    "a number for text": statement("UPDATE samples SET prompt = x'ff', classes = 7"),
}


def limb_of_three(path: Path):
    document = json.loads(path.read_text())
    document["labels"]["pose"]["limbs"][0] = [0, 1, 2]
    put(document)(path)


DAMAGES = {
    f"{DOCUMENT}: a limb of three joints": (DOCUMENT, limb_of_three),
    **{f"{DOCUMENT}: {name}": (DOCUMENT, change) for name, change in DOCUMENTS.items()},
    **{f"{LEDGER}: {name}": (LEDGER, change) for name, change in LEDGERS.items()},
    **{
        f"{SEAL}: {name}": (SEAL, change)
        for name, change in PLACES.items()
        if name not in ("a link to nothing", "a loop", "empty")
    },
    **{
        f"{name}: {kind}": (name, PLACES[kind])
        for name in ("images/00000001.png", "semantic/00000001.png")
        for kind in PLACES
    },
}


def spoilt(whole: Path, target: Path, name: str) -> Path:
    """A copy of the run folder with one damage."""
    run = Path(shutil.copytree(whole, target / "run"))
    place, change = DAMAGES[name]
    change(run / place)
    return run


def check_end(code: int, errors: str, allowed: tuple[int, ...] = (2, 3, 4)):
    assert code in allowed, (code, errors)
    lines = errors.strip().splitlines()
    assert code == 0 or (1 <= len(lines) <= 2 and "Traceback" not in errors), errors
    assert all(len(line) < 1000 and line.isprintable() for line in lines)


@pytest.mark.parametrize("name", DAMAGES)
def test_an_audit_names_it(whole, tmp_path, capsys, name):
    run = spoilt(whole, tmp_path, name)
    with in_time():
        code = audit.main([str(run), "--threads", "1", "--quiet"])
    check_end(code, capsys.readouterr().err)


@pytest.mark.parametrize("name", [name for name in DAMAGES if "images/" not in name and "semantic/" not in name])
def test_generate_goes_on_with_none_of_them(whole, tmp_path, capsys, name):
    run = spoilt(whole, tmp_path, name)
    for line in ([], ["--only", "00000001"]):
        with in_time():
            code = generate.main(["--out", str(run), "--quiet", *line])
        check_end(code, capsys.readouterr().err)


@pytest.mark.parametrize("name", [name for name in DAMAGES if SEAL not in name])
def test_a_run_that_is_opened_is_refused_in_one_sentence(whole, tmp_path, name):
    run = spoilt(whole, tmp_path, name)
    with in_time(), pytest.raises((Refused, Missing)) as caught, open_run(run) as opened:
        for sample in opened:
            assert sample.image is not None
            for task in opened.tasks:
                assert sample.label(task) is not None
        opened._rows().read_note("run")
    assert "checksum" not in caught.value.remedy


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused_at_its_row(whole, tmp_path, capsys, value):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    with closing(sqlite3.connect(run / LEDGER, isolation_level=None)) as rows:
        (labels,) = rows.execute('SELECT labels FROM samples WHERE "index" = 1').fetchone()
        labels = re.sub('"score":[0-9.]+', f'"score":{value}', labels, count=1)
        rows.execute('UPDATE samples SET labels = ? WHERE "index" = 1', (labels,))
    assert audit.main([str(run), "--quiet"]) == 4 and "sample 00000001, instance: " in capsys.readouterr().out
    for form in ("coco", "labelme"):
        assert convert.main([str(run), "--to", form, "--out", str(tmp_path / form), "--quiet"]) == 4
        assert "sample 00000001 is damaged (its labels hold NaN or an infinite number)" in capsys.readouterr().err


def test_long_lists_of_a_stranger_take_no_more_than_their_length():
    engines = [{"engine": {"engine": str(k)}, "number": 1} for k in range(50_000)]
    words = "\n".join(f"word{k}" for k in range(50_000))
    with in_time(10):
        assert len(engines_of({"engine": {}, "config": {}, "mixed": engines})) == 50_001
        assert len(class_tables.parse(f"name\n{words}\n").classes) == 50_000


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_manifest_of_an_engine_folder(tmp_path, name):
    (tmp_path / MANIFEST).write_text("{}")
    DOCUMENTS[name](tmp_path / MANIFEST)
    with in_time(), pytest.raises((Refused, Missing)):
        Manifest.read(tmp_path)


OUTPUTS = {
    "a/" + "n" * 300: 2,
    "n" * 300: 2,
    "d/" * 2500: 2,
    "new\nline": 2,
    "escape\x1b[2J": 2,
    "half\udc80": 2,
    "link": 2,
    "link/run": 2,
    "loop": 2,
    "file": 2,
    "file/run": 2,
    "pipe": 2,
}
FLAGS = {
    "generate --out": (generate, []),
    "train --out": ("train", []),
    "train --cache-dir": ("train", []),
    "export --out": (export, []),
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_place_for_results_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, capsys, flag, name):
    from datasetdm_fast import train

    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("nothing")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    Path("file").write_text("")
    command = {"train": train}.get(FLAGS[flag][0], FLAGS[flag][0])
    with in_time(5):
        code = command.main([flag.split()[1], name, "--quiet"])
    errors = capsys.readouterr().err
    check_end(code, errors, (OUTPUTS[name],))
    assert flag.split()[1] in errors and len(errors.strip().splitlines()) == 2


def test_every_flag_that_names_a_place_for_results_is_checked():
    """A new one that does not say so in its setting fails here."""
    from datasetdm_fast.export_cli import ExportConfig
    from datasetdm_fast.runs.run_settings import RunConfig
    from datasetdm_fast.settings import flags_of
    from datasetdm_fast.training.evaluation.settings import EvaluateConfig
    from datasetdm_fast.training.settings import TrainConfig

    found = {
        (cls.__name__, field.name)
        for cls in (RunConfig, TrainConfig, EvaluateConfig, ExportConfig, verify.VerifyConfig, audit.AuditConfig)
        for field in flags_of(cls)
        if field.metadata["output"]
    }
    assert found == {
        ("RunConfig", "out"),
        ("TrainConfig", "out"),
        ("TrainConfig", "cache_dir"),
        ("ExportConfig", "out"),
    }


def test_a_cache_that_a_group_shares_and_a_file_of_the_largest_size_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path))
    tmp_path.chmod(0o770)
    assert storage.cache_folder() == tmp_path
    (tmp_path / "three").write_bytes(b"abc")
    assert storage.read(tmp_path / "three", 3) == b"abc"
    with pytest.raises(Refused, match="3 bytes, at most 2 are read"):
        storage.read(tmp_path / "three", 2)
