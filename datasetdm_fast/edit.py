"""python -m datasetdm_fast.edit RUN ID --class ball --prompt "a red star": regenerate regions, with their labels."""

import sys

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.redraw import redraw
from datasetdm_fast.runs.compositions.settings import EditSettings

EXAMPLES = ('runs/demo 00000003 --class ball --prompt "a red star"',)


@command_with(EditSettings, EXAMPLES)
def main(settings: EditSettings, command: CommandLine) -> int:
    from datasetdm_fast.runs.compositions.edit import Edits

    return redraw(Edits, settings, command.text)


if __name__ == "__main__":
    sys.exit(main())
