"""python -m datasetdm_fast.vary RUN --domain night,fog: move samples of a run to other domains, with their labels."""

import sys
from collections.abc import Sequence

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.compositions.command import make, make_again, without_run
from datasetdm_fast.runs.compositions.settings import VarySettings

PROG = "python -m datasetdm_fast.vary"
EXAMPLES = ("runs/demo --domain night,fog",)


@command
def main(arguments: Sequence[str]) -> int:
    settings, given = parse(arguments, VarySettings, PROG, __doc__, EXAMPLES)
    is_remake = settings.only and "domain" not in given
    if not settings.run and not is_remake:
        if settings.only:
            raise without_run(settings, {"domain"})
        raise Refused(f"{PROG}: RUN is missing", "Name the run folder whose samples are varied, such as runs/demo.")
    from datasetdm_fast.runs.compositions.vary import Variants

    if is_remake:
        return make_again(Variants, settings, given)
    return make(Variants, settings, PROG, arguments)


if __name__ == "__main__":
    sys.exit(main())
