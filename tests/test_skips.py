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


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def test_it():\n    pytest.skip('a GPU is there')\n", 0),
        ("def test_it():\n    pytest.skip('it is red today')\n", 1),
        ("@pytest.mark.skip(reason='later')\ndef test_it(): pass\n", 1),
        ("@pytest.fixture\ndef x():\n    pytest.skip('later')\n\ndef test_it(x): pass\n", 1),
        ("@pytest.mark.xfail(reason='known')\ndef test_it():\n    raise ValueError\n", 0),
        ("pytest.importorskip('no_such_library')\ndef test_it(): pass\n", 2),
        ("pytest.skip('a GPU is there', allow_module_level=True)\ndef test_it(): pass\n", 5),
    ],
)
def test_a_skip_for_another_reason_fails_the_run(tmp_path, text, code):
    for name in ("conftest.py", "skips.py"):
        (tmp_path / name).symlink_to(HERE / name)
    (tmp_path / "test_it.py").write_text("import pytest\n\n" + text)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", tmp_path]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == code, ended.stdout
    assert code not in (1, 2) or "is skipped for a reason that is not listed in tests/skips.py" in ended.stdout
