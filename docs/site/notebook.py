"""`python docs/site/notebook.py` runs docs/tour.ipynb and stores what its cells show, after a change of a cell."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "tour.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of a cell: its last line is an expression, and its value is shown as a notebook shows it."""
    *lines, last = source.splitlines()
    exec("\n".join(lines), names)
    value = eval(last, names)
    data = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_().splitlines(keepends=True)
    return [{"output_type": "execute_result", "data": data, "metadata": {}}]


def main() -> int:
    notebook, names = json.loads(NOTEBOOK.read_text(encoding="utf-8")), {}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(cells, 1):
            outputs = run_cell("".join(cell["source"]), names)
            cell |= {"execution_count": number, "outputs": [{**each, "execution_count": number} for each in outputs]}
        os.chdir(before)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
