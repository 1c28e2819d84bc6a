"""python -m datasetdm_fast.edit RUN ID --class ball --prompt "a red star": regenerate regions of samples, with
their labels.
"""

import sys
from collections.abc import Sequence

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.redraw import redraw
from datasetdm_fast.runs.compositions.settings import EditSettings

PROG = "python -m datasetdm_fast.edit"
EXAMPLES = ('runs/demo 00000003 --class ball --prompt "a red star"',)


@command
def main(arguments: Sequence[str]) -> int:
    settings, _ = parse(arguments, EditSettings, PROG, __doc__, EXAMPLES)
    from datasetdm_fast.runs.compositions.edit import Edits

    return redraw(Edits, settings, PROG, arguments)


if __name__ == "__main__":
    sys.exit(main())
