"""The programs of docs/examples run as they stand, beside the run folder of the demo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from datasetdm_fast.generate import main

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))
LONGEST = 25  # lines


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    assert main(["--number", "4", "--steps", "4", "--out", str(folder / "runs" / "demo"), "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path, demo_run):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST and source.startswith('"""')
    done = subprocess.run(
        [sys.executable, str(path)], cwd=demo_run, env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_there_are_eight():
    assert len(EXAMPLES) == 8
