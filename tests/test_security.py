"""SECURITY.md lists every guard against files from outside, each with a test that exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `([\w.]+)` \| .+ \| `(tests/\w+\.py)::(\w+)` \|$", re.MULTILINE)


def defined(path: Path) -> set[str]:
    """Names of the functions and classes of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def test_every_guard_is_listed_with_a_test_that_exists():
    rows = ROW.findall((ROOT / "SECURITY.md").read_text())
    guards = {
        f"{path.stem}.{name}"
        for path in (ROOT / "datasetdm_fast/untrusted").glob("*.py")
        for name in defined(path)
        if not name.startswith("_")
    }
    assert {guard for guard, _, _ in rows} == guards
    assert [(file, test) for _, file, test in rows if test not in defined(ROOT / file)] == []
