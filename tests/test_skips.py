"""No test is skipped for a reason that is not on the list, and no reason stays on it that no test gives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import skips

HERE = Path(__file__).parent
SKIPPING = ("skip", "skipif", "importorskip")


def reasons() -> dict[str, str]:
    """Every reason that a test names -> the file; where it is computed, the texts it may be."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") not in SKIPPING:
                continue
            named = [word.value for word in node.keywords if word.arg == "reason"]
            if node.func.attr == "importorskip" and not named:
                named = [ast.Constant(f"could not import {node.args[0].value!r}")]
            for value in named or (node.args[:1] if node.func.attr == "skip" else []):
                found |= {part: path.name for part in _texts(value)}
    return found


def _texts(value: ast.AST) -> list[str]:
    return [part.value for part in ast.walk(value) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def test_every_reason_is_on_the_list_and_every_entry_is_a_reason():
    given = reasons()
    assert [f"{file}: {reason}" for reason, file in given.items() if not skips.is_listed(reason)] == []
    words = "\n".join([*given, (HERE / "conftest.py").read_text()])
    assert [reason for reason in skips.REASONS if reason not in words] == []
    assert all(skips.REASONS.values())


LISTED = (
    "def test_it():\n    pytest.skip('a GPU is there')\n",
    "@pytest.mark.xfail(reason='known')\ndef test_it():\n    raise ValueError\n",
)
UNLISTED = (
    "def test_it():\n    pytest.skip('it is red today')\n",
    "@pytest.mark.skip(reason='later')\ndef test_it(): pass\n",
    "@pytest.fixture\ndef x():\n    pytest.skip('later')\n\ndef test_it(x): pass\n",
)


@pytest.mark.parametrize(
    ("texts", "code", "count"),
    [
        (LISTED, 0, "1 skipped, 1 xfailed"),
        (UNLISTED, 1, "1 failed, 2 errors"),
        (("pytest.importorskip('no_such_library')\ndef test_it(): pass\n",), 2, "1 error"),
        (("pytest.skip('a GPU is there', allow_module_level=True)\ndef test_it(): pass\n",), 5, "1 skipped"),
    ],
    ids=["listed", "not listed", "no library", "no file"],
)
def test_a_skip_for_another_reason_fails_the_run(tmp_path, texts, code, count):
    for name in ("conftest.py", "forked.py", "skips.py"):
        (tmp_path / name).symlink_to(HERE / name)
    for k, text in enumerate(texts):
        (tmp_path / f"test_{k}.py").write_text("import pytest\n\n" + text)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", tmp_path]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == code and f"{count} in " in ended.stdout.splitlines()[-1], ended.stdout
    said = "is skipped for a reason that is not listed in tests/skips.py"
    assert code not in (1, 2) or all(f"test_{k}.py" in ended.stdout and said in ended.stdout for k in range(len(texts)))
