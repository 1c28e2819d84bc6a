"""What a line of a generator says before it starts: how its flags are taken, what is mended, what stays as it is."""

from collections.abc import Iterator

from datasetdm_fast.compat.showlab.lines import Line
from datasetdm_fast.compat.showlab.order import Order
from datasetdm_fast.generation.job import Job

MENDED = (
    "Q4, Q5: batches of any size give what single images give; Q9: weights with module. before their names are read; "
    "Q10: --prompt_root takes a value"
)
FIXED = "Q12, Q15, Q16, Q18, Q20: classes of the prompt, 16-bit depth, all joints, prompts of each process, all parts"
KEPT = "Q1 statistics of each image, Q3, Q8 guidance, Q17 small classes, Q23 JPEG of quality 75"
KEPT_IN_FILES = "Q12, Q15, Q16, Q18, Q20 (--fixed mends them)"
NORMS = {False: "Q2: spectral norms are those of the first image", True: "Q2: spectral norms move from image to image"}


def rows(order: Order, job: Job) -> Iterator[str]:
    """The lines of the table."""
    line, items = order.line, order.items
    seeds = sorted(item.seed for item in items)
    processes = len({item.process for item in items})
    yield _row(
        "mapped", f"{len(items)} images, seeds {seeds[0]} to {seeds[-1]}: those of --thread_num {processes} processes"
    )
    for label, (kind, flag) in order.checkpoints.items():
        yield _row("", f"{line.path(flag)}: {label} by a decoder of {kind}")
    networks = "batches" if line["together"] else "one image at a time in the networks, batches"
    yield _row("", f"model {job.engine.model.name}, engine {job.engine.name}, {networks} of {job.plan.batch_size}")
    yield from ignored(line)
    yield _row("mended", MENDED)
    if line["fixed"]:
        yield _row("", FIXED)
    if line["all"]:
        yield _row("", "--all: images that cannot be divided among the processes are made, too")
    yield _row("kept", KEPT if line["fixed"] else f"{KEPT}; {KEPT_IN_FILES}")
    yield _row("", f"Q6: timesteps of diffusers {line['profile']} (--profile); {NORMS[line['strict']]}")
    yield _row("run", f"{order.run_folder}: gallery, audit and convert take it")


def ignored(line: Line) -> Iterator[str]:
    """The flags of a line that are accepted and not used."""
    if line.idle:
        yield _row("ignored", f"{', '.join(f'--{name}' for name in line.idle)}: without effect in DatasetDM, too")


def _row(title: str, text: str) -> str:
    return f"{title:<10}{text}"
