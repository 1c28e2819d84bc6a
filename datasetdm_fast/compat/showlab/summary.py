"""The table at the start of a generator: how flags are interpreted, what is corrected, what stays as in DatasetDM."""

from collections.abc import Iterator

from datasetdm_fast.compat.showlab.lines import Line
from datasetdm_fast.compat.showlab.order import Order
from datasetdm_fast.runs.jobs.job import Job

COUNTS = ("n_each_class", "number_data")
ALWAYS_CORRECTED = (
    "batches of any size give what single images give; weights with module. before their names are read; --prompt_root "
    "takes a value"
)
CORRECTED = "class of the prompt, 16-bit depth, all joints, prompts of each process, all parts of an instance"
UNCHANGED = "normalisation by the statistics of each image, small classes left out of maps, JPEG of quality 75"
UNCHANGED_IN_FILES = (
    "class 1 for all instances, 8-bit depth, no joints at the border, the same prompts in each process, one part of an "
    "instance (--fixed corrects these)"
)
NORMS = {False: "spectral norms are those of the first image", True: "spectral norms move from image to image"}


def rows(order: Order, job: Job) -> Iterator[str]:
    """The lines of the table."""
    line, items = order.line, order.items
    seeds = sorted(item.seed for item in items)
    processes = min(len({item.process for item in items}), line["thread_num"])  # of the demo, one makes all
    yield _row(
        "settings", f"{len(items)} images, seeds {seeds[0]} to {seeds[-1]}: those of --thread_num {processes} processes"
    )
    count = next(name for name in COUNTS if name in line.values)
    if not line["all"] and (left := line[count] % line["thread_num"]):
        yield _row("", f"--{count} {line[count]}: {left} left over by {line['thread_num']} processes; --all makes them")
    for label, (kind, flag) in order.checkpoints.items():
        yield _row("", f"{line.path(flag)}: {label} by a decoder of {kind}")
    networks = "batches" if line["together"] else "one image at a time in the networks, batches"
    yield _row("", f"model {job.engine.model.name}, engine {job.engine.name}, {networks} of {job.plan.batch_size}")
    yield from rows_of_ignored(line)
    yield _row("fixed", ALWAYS_CORRECTED)
    if line["fixed"]:
        yield _row("", CORRECTED)
    if line["all"]:
        yield _row("", "--all: images that cannot be divided among the processes are made, too")
    yield _row("kept", UNCHANGED)
    if not line["fixed"]:
        yield _row("", UNCHANGED_IN_FILES)
    sampler = f"guidance {order.config.guidance:g}; timesteps of diffusers {line['profile']} (--profile)"
    yield _row("", f"{sampler}; {NORMS[line['strict']]}")
    yield _row("run", f"{order.run_folder}: gallery, audit and convert take it")


def rows_of_ignored(line: Line) -> Iterator[str]:
    """The flags of a line that are accepted and have no effect."""
    if line.ignored:
        flags = ", ".join(f"--{name}" for name in line.ignored)
        yield _row("ignored", f"{flags}: without effect in DatasetDM, too")


def _row(title: str, text: str) -> str:
    return f"{title:<10}{text}"
