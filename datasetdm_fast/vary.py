"""python -m datasetdm_fast.vary RUN --domain night,fog: move samples of a run to other domains, with their labels."""

import sys
from collections.abc import Sequence

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.redraw import redraw
from datasetdm_fast.runs.compositions.settings import VarySettings

PROG = "python -m datasetdm_fast.vary"
EXAMPLES = ("runs/demo --domain night,fog", "runs/demo --domain night --number 4 --out runs/night")


@command
def main(arguments: Sequence[str]) -> int:
    settings, _ = parse(arguments, VarySettings, PROG, __doc__, EXAMPLES)
    from datasetdm_fast.runs.compositions.vary import Variants

    return redraw(Variants, settings, PROG, arguments)


if __name__ == "__main__":
    sys.exit(main())
