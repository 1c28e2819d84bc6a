"""python -m datasetdm_fast.gallery RUN [--serve]: write, or serve, the page of a run, finished or in progress."""

import sys
from dataclasses import dataclass
from functools import partial

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_end, print_lines, print_result
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.gallery.server import FIRST_PORT, open_server
from datasetdm_fast.runs.gallery.showing import show
from datasetdm_fast.runs.run_folder.folder import PAGE
from datasetdm_fast.settings import OutputSettings, setting

EXAMPLES = ("runs/demo --serve", "runs/varied --serve --against runs/demo", "s3://bucket/run --serve")


@dataclass(frozen=True)
class GalleryConfig(OutputSettings):
    run: str = setting(
        "", "run folder, also in progress, or URL as s3://bucket/run", metavar="RUN", positional=True, required=True
    )
    serve: bool = setting(
        False, "serve the page to browsers on this machine until Ctrl-C, and store the marks of a review"
    )
    against: str = setting("", "another run, shown beside this one: its source, or one of the same plan", metavar="RUN")
    port: int = setting(FIRST_PORT, "port to serve the page on; if it is in use, the next free one", metavar="N")
    quiet: bool = setting(False, "print only the path or the address of the page")


@command_with(GalleryConfig, EXAMPLES)
def main(config: GalleryConfig, command: CommandLine) -> int:
    if not 0 < config.port < 2**16:
        raise Refused(f"--port {config.port}: expected a number from 1 to 65535", "Choose another number.")
    if config.against and not config.serve:
        raise Refused("--against: a page that is opened from disk cannot read another folder", "Add --serve.")
    run = show(config.run, is_served=config.serve, is_dry=config.dry_run)
    line = f"{config.run}: {run.samples} of {count_noun(run.planned, 'sample')}"
    line += f", and {run.doubtful} set aside" if run.doubtful else ""
    page = str(run.folder / PAGE)
    facts = {"page": page, "samples": run.samples, "number": run.planned}
    if config.dry_run:
        return print_end(config, facts, page, f"{line}, which the page would show")
    print_lines(config, line)
    if not config.serve:
        print_result(config, facts, page)
        return 0
    against = show(config.against, is_served=True).served if config.against else None
    with open_server(run.served, config.port, partial(print_lines, config), against) as serving:
        print_result(config, facts | {"address": serving.address}, serving.address)
        print_lines(config, f"marks of a review are written to {config.run}/review; Ctrl-C ends it")
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            return 130
        except SystemExit as stop:  # SIGTERM, another way to end what has no end of its own
            return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
