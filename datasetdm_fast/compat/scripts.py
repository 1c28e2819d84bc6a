"""python -m datasetdm_fast.compat.showlab run SCRIPT.py: scripts of a checkout of DatasetDM, run as they are."""

from collections.abc import Sequence

from datasetdm_fast.errors import Refused

PROG = "python -m datasetdm_fast.compat.showlab"


def main(arguments: Sequence[str]) -> int:
    """Refuses: scripts cannot be run as they are."""
    raise Refused(
        f"{PROG} run: a script of DatasetDM cannot be run as it is by this version",
        f"`{PROG} --help` lists the commands that make the same files.",
    )
