"""Samples of a run are assigned to the parts of a data set by their shares."""

import math
import re
from collections.abc import Sequence

from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.selections import Split, assign_parts, groups, origins

USUAL = ("train", "val", "test")
ROUNDED = 0.005  # of the sum, such as that of 33.3,33.3,33.3
NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def parse_shares(text: str, names: Sequence[str]) -> dict[str, float]:
    """Share by name, from texts such as 80,10,10."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
        raise Refused(f"--shares {text}: expected numbers of 0 or more, not all of them 0", "For example 80,10,10.")
    if not any(math.isclose(sum(shares), whole, rel_tol=ROUNDED) for whole in (100, 1)):
        near = ",".join(f"{100 * share / sum(shares):.3g}" for share in shares)
        raise Refused(f"--shares {text}: add up to {sum(shares):g}, expected 100", f"For example {near}.")
    if len(names) < len(shares) or (len(names) > len(shares) and tuple(names) != USUAL):
        raise Refused(
            f"--names {','.join(names)}: expected {len(shares)} different names, one for each share",
            "For example train,val,test.",
        )
    if bad := [name for name in names if not NAME.fullmatch(name)]:
        raise Refused(f"--names {bad[0]!r}: expected small letters, digits, - or _", "For example train,val,test.")
    return {name: share for name, share in zip(names, shares) if share}


def split_run(run: Run, shares: dict[str, float], seed: int, *, by_source: bool) -> tuple[Split, str]:
    """The split of a run, and why parts are empty, if any is."""
    if not len(run):
        raise Refused(f"{run.path}: holds no sample", "Name a run folder with samples.")
    indices, keys = [], []
    for row in run.rows(("files",)):
        indices.append(row.request.index)
        keys.append(origins(run.document, row) if by_source else (row.request.id,))
    parts: dict[str, list[int]] = {name: [] for name in shares}
    for index, name in zip(indices, assign_parts(keys, shares, seed)):
        parts[name].append(index)
    empty = [name for name in parts if not parts[name]]
    has_groups = len(set(groups(keys))) < len(keys)
    why = "too many samples were made of one picture" if has_groups else "there are too few samples"
    indices_by_name = {name: tuple(of_part) for name, of_part in parts.items()}
    split = Split(seed, by_source, indices_by_name, tuple(shares.values()))
    return split, f"none left for {', '.join(empty)}, as {why}" if empty else ""
