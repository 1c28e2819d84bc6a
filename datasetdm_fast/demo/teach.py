"""python -m datasetdm_fast.demo.teach --out DIR: the five demo decoders from 100 rendered, labelled scenes.

It is `python -m datasetdm_fast.train` with the settings of the decoders that ship with the package; any of its flags
may follow.
"""

import runpy
import sys
from collections.abc import Sequence

from datasetdm_fast.config import TASKS

SETTINGS = {
    "--model": "demo",
    "--data": "demo:100@1000",
    "--task": ",".join(TASKS),
    "--held-out": "0",
    "--storage": "fp16",
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    sys.argv[1:] = [*(word for pair in SETTINGS.items() for word in pair), *given]
    try:
        runpy.run_module("datasetdm_fast.train", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
