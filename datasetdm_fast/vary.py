"""python -m datasetdm_fast.vary RUN --domain night,fog: move samples of a run to other domains, with their labels."""

import sys

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.redraw import redraw
from datasetdm_fast.runs.compositions.settings import VarySettings

EXAMPLES = ("runs/demo --domain night,fog", "runs/demo --domain night --number 4 --out runs/night")


@command_with(VarySettings, EXAMPLES)
def main(settings: VarySettings, command: CommandLine) -> int:
    from datasetdm_fast.runs.compositions.vary import Variants

    return redraw(Variants, settings, command.text)


if __name__ == "__main__":
    sys.exit(main())
