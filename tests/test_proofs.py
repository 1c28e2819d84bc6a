"""Proofs that foreign files run no code here: tests/proofs.py tries each in a process of its own, with a canary to
catch what gets out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import proofs
import pytest

from datasetdm_fast.export.tensorrt import sealed

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("proofs")
    environment = {**os.environ, "PYTHONPATH": str(HERE), "DATASETDM_CACHE": str(folder / "cache")}
    environment |= {sealed.KEY_VARIABLE: str(folder / "key")}
    ended = subprocess.run(
        [sys.executable, HERE / "proofs.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


# What a case may end with other than a refusal: it holds no code for us, and is read as the plain values it also is.
HARMLESS = {
    "pickle: after the end": "0 tensors",
    "archive: after the end": "0 tensors",
    "pickle: before a good pickle": "",
    "model: auto_map and trust_remote_code": "loaded",
    "model: attention code from the hub": "loaded",
    "model: quantisation code": "loaded",
    "model: adapters beside the weights": "loaded",
    "model: a scheduler class by path": "loaded",
    "model: a tokenizer class by path": "loaded",
    "model: a chat template that climbs": "loaded",
    "prompts: a shell behind a pipe": "kept as they are",
    "run folder: a description with a target": "['_target_', 'command']",
}


@pytest.mark.parametrize("name", list(proofs.CASES))
def test_no_code_runs(results, name):
    found = results[name]
    assert not found["canary"] and not found["events"], found
    if found["ended"] == "accepted":
        assert name in HARMLESS and found["said"].startswith(HARMLESS[name]), found
    else:
        # Behind the sandbox the reader may raise what it likes; everywhere else the refusal is one sentence.
        is_inner = name.startswith(("pickle", "archive", "legacy", "torchscript", "tar", "a numpy", "sandbox"))
        assert found["ended"] in ("Refused", "Missing") or is_inner, found
        assert found["said"] and (is_inner or "\n" not in found["said"]), found


def test_there_are_enough_proofs():
    assert len(proofs.CASES) >= 40
