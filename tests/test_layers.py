"""Every storey imports only storeys below it."""

import re
from pathlib import Path

import pytest
from layers import HERE, PACKAGE, House, survey

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def house() -> House:
    return survey(HERE)


def test_every_room_imports_only_rooms_below_it(house, capsys):
    with capsys.disabled():
        print("\n" + ", ".join(f"{count} {name}" for name, count in house.figures.items()))
    assert house.faults == []


FAMILIES = re.compile(r"sdxl|stable.?diffusion|flux|klein|z.?image|qwen|\bsd3\b", re.IGNORECASE)
APART = [Path(PACKAGE) / place for place in ("engine/backbones", "compat", "runs/run_folder/indexes/licences.py")]


def test_families_of_models_are_named_in_their_records_alone():
    """Beside these, licences are called so, and programs of others have such flags."""
    named = [
        f"{path}:{number}"
        for path in sorted((HERE / PACKAGE).rglob("*.py"))
        if not any(path.is_relative_to(HERE / place) for place in APART)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FAMILIES.search(line)
    ]
    assert named == []


TREE = {"runs/a.py": "", "engine/b.py": "", "disk/c.py": "", "disk/d.py": ""}


@pytest.fixture
def tree(tmp_path):
    """A checkout of four files without a fault, and a way to write into it."""

    def write(path: str, text: str) -> None:
        (tmp_path / PACKAGE / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / PACKAGE / path).write_text(f'"""It."""\n{text}', encoding="utf-8")

    for path, text in {
        **TREE,
        "__init__.py": "",
        **{f"{room}/__init__.py": "" for room in ("runs", "engine", "disk")},
    }.items():
        write(path, text)
    return write


@pytest.mark.parametrize(
    "path, text, said",
    [
        ("runs/a.py", "from datasetdm_fast.engine import b", None),
        (
            "engine/b.py",
            "from datasetdm_fast.runs import a",
            "engine/b.py:2: engine imports datasetdm_fast.runs.a, which is of runs",
        ),
        (
            "engine/b.py",
            "def f():\n    from datasetdm_fast.runs.a import x",
            "engine/b.py:3: engine imports datasetdm_fast.runs.a",
        ),
        ("engine/b.py", "import datasetdm_fast.runs.a", "engine/b.py:2: engine imports datasetdm_fast.runs.a"),
        ("engine/b.py", "from ..runs import a", "engine/b.py:2: engine imports datasetdm_fast.runs.a"),
        ("elsewhere.py", "from datasetdm_fast.runs import a", None),
        ("runs/a.py", "from datasetdm_fast import elsewhere", "runs/a.py:2: runs imports datasetdm_fast.elsewhere"),
        ("disk/c.py", "class One: ...\nclass Two: ...", None),
        ("disk/c.py", "class One: ...\nclass Inner:\n    class One: ...", "class One: "),
    ],
)
def test_what_does_not_fit_is_named(tree, tmp_path, path, text, said):
    tree("elsewhere.py", "")
    tree(path, text)
    faults = survey(tmp_path).faults
    assert (faults == []) if said is None else any(said in fault for fault in faults), faults


def test_circles_are_named_file_by_file(tree, tmp_path):
    tree("disk/c.py", "from datasetdm_fast.disk.d import x")
    tree("disk/d.py", "def f():\n    from datasetdm_fast.disk import c")
    tree("runs/a.py", "from datasetdm_fast.engine import b")
    tree("engine/b.py", "from datasetdm_fast.runs import a")
    found = survey(tmp_path)
    assert found.room_circles == [["engine.b", "runs.a"]]
    assert ["datasetdm_fast.disk.c", "datasetdm_fast.disk.d"] in found.file_circles and len(found.file_circles) == 2


def test_a_file_without_a_sentence_is_named(tree, tmp_path):
    (tmp_path / PACKAGE / "disk" / "e.py").write_text("x = 1\n")
    assert [fault for fault in survey(tmp_path).faults if "no sentence" in fault] == [
        f"{PACKAGE}/disk/e.py: no sentence says what it is for"
    ]
