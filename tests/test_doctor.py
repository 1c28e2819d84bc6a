"""The doctor answers on a sound machine and on any broken one, and never with a traceback."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import forked
import pytest
from skips import IS_LONG

from datasetdm_fast import doctor
from datasetdm_fast.command_line import probes

SECTIONS = {"package", "system", "libraries", "gpu", "torch", "engines", "sandbox", "self_test"}
SECONDS = 240

# A module of this name lies before the real one and does this when it is imported.
BROKEN = {
    "torch raises": ("torch", "raise RuntimeError('libcublas.so.13: undefined symbol \\x1b[31m')"),
    "torch crashes": ("torch", "import os; os.kill(os.getpid(), 11)"),
    "torch ends the process": ("torch", "import os; os._exit(0)"),
    "torch is another thing": ("torch", "x = 1"),
    "torch talks": ("torch", "print('datasetdm-doctor:{\"tor'); print('x' * 100000); raise ImportError"),
    "numpy raises": ("numpy", "raise ImportError('numpy.core.multiarray failed to import')"),
    "sqlite3 raises": ("sqlite3", "raise ImportError('No module named _sqlite3')"),
    "diffusers raises": ("diffusers", "raise SystemExit(5)"),
}
if IS_LONG:
    BROKEN["pillow raises"] = ("PIL", "raise OSError(28, 'No space left on device')")


def test_the_libraries_are_those_that_the_package_and_its_extras_ask_for():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if name != "dev"]
    asked = {re.match(r"[\w-]+", line)[0] for line in sum(extras, project["dependencies"])}
    assert set(doctor.LIBRARIES) == asked


def ask(*arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, **environment, **({"PYTHONPATH": path} if path else {})}
    return subprocess.run(
        [sys.executable, "-m", "datasetdm_fast.doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=variables,
    )


def test_a_sound_machine(monkeypatch, capsys):
    if not IS_LONG:  # else by new interpreters, which spend most of their time on importing libraries
        monkeypatch.setattr(probes, "subprocess", forked.subprocesses)
    code = doctor.main(["--json"])
    out, err = capsys.readouterr()
    assert code == 0 and err == "", err
    found = json.loads(out)
    assert set(found) == SECTIONS and found["self_test"]["passed"] and found["self_test"]["problem"] == ""
    assert (
        found["torch"]["version"].startswith("2.")
        and found["libraries"]["torch"]
        and found["package"]["extension"]["problem"] == ""
    )
    engines = found["engines"]
    assert engines["torch"]["runs"] and engines["fast"]["runs"]
    assert all(engine["runs"] or (engine["cause"] and engine["remedy"]) for engine in engines.values())
    told = doctor.describe(found)
    assert any(line.split()[:2] == ["self-test", "passed"] for line in told) and all("\n" not in line for line in told)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_machine(case, tmp_path):
    name, content = BROKEN[case]
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(content)
    if name == "sqlite3":  # which every command begins with, so that torch need not be loaded to see it
        (tmp_path / "torch.py").write_text("raise ImportError")
    ended = ask("--json", path=str(tmp_path))
    assert ended.returncode == 3, ended.stdout[-2000:]
    assert "Traceback" not in ended.stdout + ended.stderr and len(ended.stderr.splitlines()) == 2, ended.stderr
    found = json.loads(ended.stdout)
    assert set(found) == SECTIONS and not found["self_test"]["passed"] and found["self_test"]["problem"]
    assert "\x1b" not in ended.stdout
    if name == "torch":
        assert not found["engines"]["torch"]["runs"] and found["engines"]["torch"]["cause"]
    assert doctor.describe(found)


def test_the_family_of_a_folder_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "subprocess", forked.subprocesses)
    questions = {}
    for name in ("FluxPipeline", "KolorsPipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": name}))
        questions[name] = probes.MODEL_PROBE.format(folder=str(tmp_path / name))
    answers = probes.run_probes(questions)
    assert answers["FluxPipeline"] == {
        "problem": "",
        "family": "FLUX.1",
        "engines": ["torch", "fast", "ort", "openvino"],
    }
    assert "holds a KolorsPipeline" in answers["KolorsPipeline"]["problem"]
    assert doctor.main(["--model", str(tmp_path / "absent")]) == 2 and "no such folder" in capsys.readouterr().err


def test_one_question_that_hangs_or_crashes_costs_no_other_answer(monkeypatch):
    run = subprocess.run
    patient = lambda line, timeout, **options: run(line, timeout=4 if "hangs" in line[-1] else 60, **options)  # noqa: E731
    monkeypatch.setattr(probes.subprocess, "run", patient)
    questions = {
        "first": "report(a=1)",
        "hangs": "import time; time.sleep(60)",
        "crashes": "import os; os.kill(os.getpid(), 11)",
        "raises": "raise ValueError('no')",
        "silent": "pass",
        "last": "report(b=2)",
    }
    answers = probes.run_probes(questions, timeout=2)
    assert answers["first"] == {"problem": "", "a": 1} and answers["last"] == {"problem": "", "b": 2}
    assert (
        answers["hangs"]["problem"] == "no answer within 2 s" and answers["crashes"]["problem"] == "crashed (SIGSEGV)"
    )
    assert answers["raises"]["problem"] == "ValueError: no" and answers["silent"]["problem"]


def test_where_no_process_starts_every_answer_says_so(monkeypatch):
    def fail(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(probes.subprocess, "run", fail)
    found = probes.run_probes({"a": "1", "b": "2"})
    assert [found[name]["problem"] for name in "ab"] == ["no process could be started (Cannot allocate memory)"] * 2


def test_a_library_whose_description_is_broken_is_of_an_unknown_version(monkeypatch):
    def fail(name):
        raise ValueError("no metadata")

    monkeypatch.setattr(doctor.metadata, "version", fail)
    assert doctor._find_version("torch") == "unknown (ValueError)"


def test_a_package_that_does_not_load_is_told_with_all_that_was_found(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasetdm_fast.command_line.ending", None)
    monkeypatch.setattr(doctor, "examine", lambda: {"found": 1})
    monkeypatch.setattr(doctor, "describe", lambda facts: [f"facts {facts}"])
    for line, shown in (([], "facts {'found': 1}\n"), (["--json"], '{"found": 1}\n')):
        monkeypatch.setattr(sys, "argv", ["doctor", *line])
        assert doctor.main() == 3
        out, err = capsys.readouterr()
        assert out == shown and "command_line does not load: " in err and err.endswith("Reinstall the package.\n")


def test_a_person_is_told_what_is_done_and_the_family_of_a_model(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda folder: {"self_test": {"passed": True, "problem": ""}})
    monkeypatch.setattr(doctor, "describe", lambda facts: ["all is well"])
    assert doctor._run_command([]) == 0
    out, err = capsys.readouterr()
    assert out == "all is well\n" and "about ten seconds" in err


def test_each_part_of_a_machine_has_a_line_of_its_report():
    card = {"name": "H200", "capability": "9.0", "memory": 150.7e9}
    facts = {
        "package": {"version": "1", "path": "/p", "extension": {"problem": "", "cuda": True}},
        "system": {"python": "3.11", "platform": "Linux", "cores": 2},
        "libraries": {"torch": "2.13", "ray": ""},
        "gpu": {"problem": "", "driver": "580"},
        "torch": {"problem": "", "version": "2.13", "cuda": "", "devices": [card, card]},
        "engines": {
            "fast": {"runs": True, "cause": "", "remedy": ""},
            "trt": {"runs": False, "cause": "no GPU", "remedy": "Get one."},
        },
        "sandbox": {"problem": "", "missing": []},
        "model": {"problem": "", "family": "SDXL", "engines": ["torch", "fast"]},
        "self_test": {"passed": True, "problem": ""},
    }
    told = {line[:19].strip(): line[19:] for line in doctor.describe(facts)}
    assert told == {
        "package": "datasetdm_fast 1 in /p",
        "extension": "built with CUDA",
        "system": "Python 3.11, Linux, 2 cores",
        "libraries": "torch 2.13",
        "missing": "ray",
        "driver": "580",
        "torch": "2.13, CUDA none",
        "GPUs": "H200 (9.0, 151 GB), H200 (9.0, 151 GB)",
        "pickles": "read by a process without network, programs and files",
        "--engine fast": "runs here",
        "--engine trt": "does not run here: no GPU. Get one.",
        "model": "SDXL, for the engines torch, fast",
        "self-test": "passed",
    }
    crashed = {"problem": "crashed (SIGSEGV)"}
    parts = dict.fromkeys(("gpu", "torch", "model", "sandbox"), crashed) | {"self_test": crashed | {"passed": False}}
    package = facts["package"] | {"extension": crashed}
    told = {line[:19].strip(): line[19:] for line in doctor.describe(facts | parts | {"package": package})}
    assert {told[name] for name in ("extension", "driver", "torch", "model", "pickles")} == {"crashed (SIGSEGV)"}
    assert told["GPUs"] == "none"
    assert told["self-test"] == "FAILED: crashed (SIGSEGV)"
    missing = {"problem": "", "missing": ["a network of its own", "a lock"]}
    assert "without a network of its own; a lock" in "".join(doctor.describe(facts | {"sandbox": missing}))
