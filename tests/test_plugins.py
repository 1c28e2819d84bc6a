"""A package of another name adds an engine and a reader through its entry points; what is broken is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from datasetdm_fast.config import EngineKind
from datasetdm_fast.errors import Missing
from datasetdm_fast.plugins import Registry

CODE = """
from datasetdm_fast.config import EngineKind
from datasetdm_fast.engines.torch import TorchEngine
from datasetdm_fast.readers import demo

class Slow(TorchEngine):
    name = "slow"

SLOW = EngineKind("foreign_things:Slow")

def scenes(path, split, size, tasks):
    return demo.read(path.name, size)
"""
POINTS = """[datasetdm_fast.engines]
slow = foreign_things:SLOW
torn = foreign_things:NOTHING
wrong = foreign_things:scenes
torch = foreign_things:NOTHING

[datasetdm_fast.readers]
scenes = foreign_things:scenes
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "foreign_things.py").write_text(CODE)
    (folder / "foreign_things-1.0.dist-info").mkdir()
    (folder / "foreign_things-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: foreign-things\nVersion: 1.0\n"
    )
    (folder / "foreign_things-1.0.dist-info" / "entry_points.txt").write_text(POINTS)
    return folder


def test_code_of_others_is_loaded_when_it_is_asked_for(installed, monkeypatch):
    monkeypatch.syspath_prepend(str(installed))
    registry = Registry("engines", {"torch": 1}, EngineKind)
    assert registry.names == ("torch", "slow", "torn", "wrong") and list(registry) == ["torch"]
    assert "slow" in registry and "none" not in registry and "foreign_things" not in sys.modules
    assert registry["torch"] == 1 and registry["slow"].engine == "foreign_things:Slow"
    for name, message in (("torn", "'torn' of the package foreign-things does not load"), ("wrong", "is a function")):
        with pytest.raises(Missing, match=message):
            registry[name]
    with pytest.raises(KeyError):
        registry["none"]
    sys.modules.pop("foreign_things")


# One process for all: what each line ends with and says, then the length of a data set.
COMMANDS = """
import contextlib, io, json, sys
from datasetdm_fast import generate
from datasetdm_fast.readers import open_data
found = []
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = generate.main(line)
    found.append((code, said.getvalue()))
print(json.dumps([*found, len(open_data("scenes:/x/3", 64))]))
"""


def test_commands_run_them_by_name(installed, tmp_path):
    paths = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    few = "--model tiny --task semantic --steps 2 --number 1 --prompts ball --quiet --out run --engine".split()
    expected = {
        "torn": (3, "'torn' of the package foreign-things does not load"),
        "slow": (0, ""),
        "slo": (2, "did you mean slow?"),
    }
    ended = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([[*few, name] for name in expected])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert ended.returncode == 0, ended.stderr
    *found, count = json.loads(ended.stdout)
    for (code, says), (ended_with, said) in zip(expected.values(), found, strict=True):
        assert ended_with == code and says in said, said
    assert json.loads((tmp_path / "run" / "run.json").read_text())["engine"]["engine"] == "slow" and count == 3
