"""python -m bench.world NAME: a command of datasetdm_fast, such as evaluate, that also reads hard:COUNT@SEED."""

import sys

from bench.world.hard.reader import register
from datasetdm_fast import cli


def main(arguments: list[str] | None = None) -> int:
    register()
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
