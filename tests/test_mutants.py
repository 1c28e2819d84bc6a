"""The list of planted faults stays true, and their run tells what is noticed from what is not."""

import random

import drawn_mutants
import mutants
import pytest
from mutants import BROKEN, HERE, MISSED, NOTICED, Mutant, copied, outcome, planted
from planted import MUTANTS

MODULES = ("loop/driver", "run_folder/ledger", "run_folder/indexes/", "sampling/", "models/capture", "tasks/")
MORE = ("labels/", "agreement/", "untrusted/", "workers/claims")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}:{mutant.old}"[:100])
def test_every_fault_can_be_planted(mutant):
    planted((HERE / mutant.file).read_text(), mutant)
    assert mutant.harm and all((HERE / "tests" / name.split("::")[0]).is_file() for name in mutant.tests.split())


def test_there_are_faults_in_every_room_that_decides_a_sample():
    assert len(MUTANTS) >= 60 and len(set(MUTANTS)) == len(MUTANTS)
    for module in (*MODULES, *MORE):
        assert any(module in mutant.file for mutant in MUTANTS), module


def fault(old, new, tests="test_sums.py"):
    return Mutant("sums.py", old, new, "a wrong sum", tests)


@pytest.mark.parametrize("source", ["x = f(a, b)\n", "x = f(\n    a,  # first\n    b,\n)\n"])
def test_code_is_found_whatever_its_layout(source):
    assert planted(source, fault("f(a, b)", "f(b, a)")) == "x = f(b, a)\n"


@pytest.mark.parametrize(
    ("old", "new", "said"), [("g(a)", "g(b)", "0 times"), ("a", "b", "2 times"), ("f(a", "f((a)", "changes nothing")]
)
def test_a_fault_that_is_not_one_is_an_error(old, new, said):
    with pytest.raises(ValueError, match=said):
        planted("x = f(a)\ny = a\n", fault(old, new))


def test_what_the_tests_say_of_a_fault(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "tests").mkdir(parents=True)
    (root / "sums.py").write_text("def total(a, b):\n    return a + b\n")
    (root / "tests" / "test_sums.py").write_text("import sums\n\ndef test_total():\n    assert sums.total(2, 2) == 4\n")
    copy = copied(root, tmp_path / "copy")
    monkeypatch.setattr(mutants, "LIBRARIES", ["pytest"])
    assert outcome(copy, fault("a + b", "a - b")) == NOTICED
    assert outcome(copy, fault("a + b", "a * b")) == MISSED
    assert outcome(copy, fault("def total", "def sum")) == NOTICED
    assert outcome(copy, fault("def total(a, b)", "raise ValueError\ndef total(a, b)")) == BROKEN
    monkeypatch.setattr(mutants, "LONGEST", 2)
    assert outcome(copy, fault("return a + b", "__import__('time').sleep(60)")) == mutants.HANGS
    assert (copy / "sums.py").read_text() == (root / "sums.py").read_text()


SOURCE = """
LIMIT = 0.5

def total(a: int = 2, *, sure=True):
    \"\"\"Texts are no code: 3 < 4.\"\"\"
    if sure and not a:
        raise ValueError(f"{a + 1}")
    return join(a, a - 1) if a < 3 else other / "2"
"""


def test_faults_that_can_be_drawn():
    drawn = list(drawn_mutants.drawn_from("sums.py", SOURCE, "test_sums.py"))
    told = sorted(mutant.harm for mutant in drawn)
    assert told == sorted(
        [
            "2: 0.5 -> 1.0",
            "4: 2 -> 1",
            "4: True -> False",
            "6: sure and not a -> (sure or not a)",
            "6: not a -> (a)",
            "8: a < 3 -> (a <= 3)",
            "8: 3 -> 2",
            "8: join(a, a - 1) -> (join(a - 1, a))",
            "8: a - 1 -> (a)",
            "8: 1 -> 2",
        ]
    )
    changed = planted(SOURCE, next(mutant for mutant in drawn if mutant.harm == "8: a - 1 -> (a)"))
    assert "join(a, (a)) if a < 3" in changed and changed.count("\n") == SOURCE.count("\n")


def test_drawn_faults_can_be_planted_and_reasons_are_of_code_that_is_there():
    every = drawn_mutants.all_faults()
    for mutant in random.Random(0).sample(every, 12):
        planted((HERE / mutant.file).read_text(), mutant)
    seen = {(file, key) for mutant in every for file, key in [drawn_mutants.find_survivor(mutant)] if key}
    listed = {(file, key) for file, reasons in drawn_mutants.known_survivors().items() for key in reasons}
    assert seen == listed
    tests = {name for names in drawn_mutants.ROOMS.values() for name in names.split()}
    assert all((HERE / "tests" / f"test_{name}.py").is_file() for name in tests)
