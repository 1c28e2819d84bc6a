"""python -m datasetdm_fast.edit RUN --only ID --class ball --prompt "a red star": regenerate regions of samples, with
their labels.
"""

import sys
from collections.abc import Sequence

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions.command import make, make_again, without_run
from datasetdm_fast.runs.compositions.settings import EditSettings

PROG = "python -m datasetdm_fast.edit"
EXAMPLES = ('runs/demo --only 00000003 --class ball --prompt "a red star"',)


@command
def main(arguments: Sequence[str]) -> int:
    settings, given = parse(arguments, EditSettings, PROG, __doc__, EXAMPLES)
    asked = given & {"prompt", "class_", "instance", "mask", "box"}
    is_remake = settings.only and not asked
    if not settings.run and not is_remake:
        if settings.only:
            raise without_run(settings, asked)
        raise Refused(f"{PROG}: RUN is missing", "Name the run folder whose samples are edited, such as runs/demo.")
    from datasetdm_fast.runs.compositions.edit import Edits

    if is_remake:
        return make_again(Edits, settings, given)
    return make(Edits, settings, PROG, arguments)


if __name__ == "__main__":
    sys.exit(main())
