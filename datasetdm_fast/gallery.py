"""python -m datasetdm_fast.gallery RUN [--serve]: write, or serve, the page of a run, finished or in progress."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result
from datasetdm_fast.command_line.progress import shows_bar
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.gallery.server import FIRST_PORT, open_server
from datasetdm_fast.runs.gallery.showing import show
from datasetdm_fast.runs.run_folder.object_store import StoreCopy, copy_of, copy_run
from datasetdm_fast.runs.run_folder.page_files import PAGE
from datasetdm_fast.runs.run_folder.shard_audit import find_sharded
from datasetdm_fast.settings import dry_run_setting, setting

EXAMPLES = ("runs/demo --serve", "runs/varied --serve --against runs/demo", "s3://bucket/run --out runs/copy")


@dataclass(frozen=True)
class GalleryConfig:
    run: str = setting(
        "", "run folder, also in progress, or URL as s3://bucket/run", metavar="RUN", positional=True, required=True
    )
    serve: bool = setting(
        False, "serve the page to browsers on this machine until Ctrl-C, and store the marks of a review"
    )
    out: str = setting(
        "",
        "folder for a complete copy of a run in an object store, with its page; for the page of a run in shards",
        metavar="DIR",
        output="folder",
    )
    against: str = setting("", "another run, shown beside this one: its source, or one of the same plan", metavar="RUN")
    port: int = setting(FIRST_PORT, "port to serve the page on; if it is in use, the next free one", metavar="N")
    dry_run: bool = dry_run_setting()
    json: bool = setting(False, "machine-readable result on stdout")
    quiet: bool = setting(False, "print only the path or the address of the page")


@command_with(GalleryConfig, EXAMPLES)
def main(config: GalleryConfig, command: CommandLine) -> int:
    if not 0 < config.port < 2**16:
        raise Refused(f"--port {config.port}: expected a number from 1 to 65535", "Choose another number.")
    if config.against and not config.serve:
        raise Refused("--against: a page that is opened from disk cannot read another folder", "Add --serve.")
    is_copied = bool(config.out) and find_sharded(config.run) is None
    place = config.out if is_copied and not config.dry_run else config.run
    if is_copied:
        _copy(config)
    is_served = config.serve or bool(config.dry_run and config.out)
    run = show(place, config.out, is_served=is_served, is_dry=config.dry_run)
    line = f"{place}: {run.samples} of {count_noun(run.planned, 'sample')}"
    line += f", and {run.doubtful} set aside" if run.doubtful else ""
    page = str((Path(config.out) if config.out else run.folder) / PAGE)
    facts = {"page": page, "samples": run.samples, "number": run.planned}
    if config.dry_run:
        return print_plan(config, facts, page, f"{line}, which the page would show")
    print_lines(config, line)
    if not config.serve:
        print_result(config, facts, page)
        return 0
    against = show(config.against, is_served=True).served_run() if config.against else None
    with open_server(run.served_run(), config.port, partial(print_lines, config), against) as serving:
        print_result(config, facts | {"address": serving.address}, serving.address)
        print_lines(config, f"marks of a review are written to {place}/review; Ctrl-C ends it")
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            return 130
        except SystemExit as stop:  # SIGTERM, another way to end what has no end of its own
            return int(stop.code or 0)
    return 0


def _copy(config: GalleryConfig) -> None:
    copies = copy_of(config.run)
    if copies is None:
        remedy = "Drop --out: the page of a local run is written into its own folder."
        raise Refused(f"--out: {config.run} is a local folder", remedy)
    if not config.dry_run:
        with tqdm(unit="file", file=sys.stderr, disable=not shows_bar(config.quiet)) as bar:
            copy_run(StoreCopy(copies.store.url, Path(config.out)), bar.reset, bar.update)


if __name__ == "__main__":
    sys.exit(main())
