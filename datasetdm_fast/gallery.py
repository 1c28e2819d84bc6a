"""python -m datasetdm_fast.gallery RUN [--serve]: the page of a run folder, of one in progress too, written and, if
asked for, served to the browsers of this machine.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.config import setting
from datasetdm_fast.errors import Refused
from datasetdm_fast.run_folder.gallery import server
from datasetdm_fast.run_folder.showing import show

PROG = "python -m datasetdm_fast.gallery"


@dataclass(frozen=True)
class GalleryConfig:
    run: str = setting("", "run folder, finished, stopped or in progress", metavar="RUN", positional=True)
    serve: bool = setting(
        False, "serve it to browsers of this machine until Ctrl-C; marks of a review are written down"
    )
    against: str = setting("", "another run, shown beside this one: its source, or one of the same plan", metavar="RUN")
    port: int = setting(server.FIRST_PORT, "port to serve it on; where it is taken, the next that is free", metavar="N")
    quiet: bool = setting(False, "print only the path or the address of the page")


@command
def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, GalleryConfig, PROG, __doc__)
    if not config.run:
        raise Refused(f"{PROG}: RUN is missing", "Name the run folder, for example runs/demo.")
    if not 0 < config.port < 2**16:
        raise Refused(f"--port {config.port}: expected a number from 1 to 65535", "Choose another number.")
    if config.against and not config.serve:
        raise Refused("--against: a page from a disk reads no other folder", "Add --serve.")
    page, there, planned = show(Path(config.run))
    _say(config, f"{config.run}: {there} of {planned} samples")
    if not config.serve:
        print(page, flush=True)
        return 0
    against = Path(config.against) if config.against else None
    if against:
        show(against)
    with server.opened(Path(config.run), config.port, lambda line: _say(config, line), against) as serving:
        print(serving.address, flush=True)
        _say(config, f"marks of a review are written to {config.run}/review; Ctrl-C ends it")
        serving.serve_forever()
    return 0


def _say(config: GalleryConfig, line: str) -> None:
    if not config.quiet:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
