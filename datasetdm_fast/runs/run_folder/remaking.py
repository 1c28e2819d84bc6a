"""Which sample of a run folder --only regenerates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.document import COMMANDS, LEDGER, differences, made_by, read_document
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row

LONGEST_ID = 18  # digits


def find_remake_row(folder: Path, id: str) -> tuple[dict[str, Any], Row]:
    """run.json and the row of a sample; a folder that generate has not made and an unknown id are refused."""
    stored = read_document(folder)
    if stored is None or not (folder / LEDGER).exists():
        raise Refused(f"--only {id}: {folder} is not a run folder", "Name the folder with --out.")
    if made_by(stored) != COMMANDS[0]:
        raise Refused(
            f"--only {id}: {folder} was made by {made_by(stored)}",
            "Take damaged samples out with audit --repair; the line that made the run then makes them again.",
        )
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        row = ledger.row(int(id)) if id.isdecimal() and len(id) <= LONGEST_ID else None
    if row is None:
        raise Refused(
            f"--only {id}: no sample of {folder} has this id", "Use an id from samples.jsonl, for example 00000003."
        )
    return stored, row


def check_provided(folder: Path, stored: Mapping[str, Any], provided: Mapping[str, Any]) -> None:
    """Refuses settings provided with --only that are not those of the run folder, which decide what is regenerated."""
    changes = [line for name in sorted(provided) for line in differences(stored.get(name), provided[name], name)]
    if changes:
        raise Refused(
            f"{folder}: it holds a run with other settings ({'; '.join(changes)})",
            "Drop these flags: --only takes them from the run folder.",
        )
