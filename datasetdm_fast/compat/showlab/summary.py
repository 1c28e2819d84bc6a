"""The lines that a generator prints at the start: its images, decoders, engine and ignored flags."""

from collections.abc import Iterator

from datasetdm_fast.compat.showlab.generator import Order
from datasetdm_fast.compat.showlab.lines import Line
from datasetdm_fast.runs.jobs.job import Job

COUNTS = ("n_each_class", "number_data")


def rows(order: Order, job: Job) -> Iterator[str]:
    """The lines of the table."""
    line, items = order.line, order.items
    seeds = sorted(item.seed for item in items)
    processes = f"--thread_num {line['thread_num']} processes"
    yield _row("settings", f"{len(items)} images, seeds {seeds[0]} to {seeds[-1]}: those of {processes}")
    count = next(name for name in COUNTS if name in line.values)
    if left := line[count] % line["thread_num"]:
        yield _row("", f"--{count} {line[count]}: {left} left over by {line['thread_num']} processes")
    yield _row("", f"{line.path('grounding_ckpt')}: {order.script.task} by a decoder of {order.kind}")
    networks = f"one image at a time in the networks, batches of {job.plan.batch_size}"
    yield _row("", f"model {job.engine.model.name}, engine {job.engine.name}, {networks}")
    yield _row("", f"guidance {order.config.guidance:g}; timesteps of diffusers {line['profile']} (--profile)")
    yield from rows_of_ignored(line)
    yield _row("run", f"{order.run_folder}: for gallery, audit and convert")


def rows_of_ignored(line: Line) -> Iterator[str]:
    """The flags of a line that are accepted and have no effect."""
    if line.ignored:
        flags = ", ".join(f"--{name}" for name in line.ignored)
        yield _row("ignored", f"{flags}: without effect in DatasetDM, too")


def _row(title: str, text: str) -> str:
    return f"{title:<10}{text}"
