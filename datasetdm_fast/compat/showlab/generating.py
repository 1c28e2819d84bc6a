"""A line of a generator as an ordinary run, which also writes the files that DatasetDM writes of every sample."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from datasetdm_fast.command_line.output import check_output
from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.compat.showlab.generator import IMAGES, RUN, Order
from datasetdm_fast.compat.showlab.lines import Line
from datasetdm_fast.compat.showlab.prompts import check_present
from datasetdm_fast.data import Batch, Quarantined, Sample
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.loop import driver, labelling
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.run import comparable_settings, prepare_job, settle
from datasetdm_fast.runs.jobs.writing import Result, write_missing
from datasetdm_fast.runs.run_folder.document import LEDGER, check_same, read_document
from datasetdm_fast.runs.run_folder.ledger import DONE, Ledger
from datasetdm_fast.runs.run_settings import RunSpec

COMMAND = "compat.showlab"
Raw = Mapping[str, Mapping[str, Tensor]]  # label -> the raw outputs of its decoder


@dataclass(frozen=True, repr=False)
class FiledSample(Sample):
    """A sample with the files that DatasetDM writes of it."""

    files: Mapping[str, bytes] = field(default_factory=dict)


class FilingGenerator(driver.BatchGenerator):
    """Makes DatasetDM's files of every sample; images are sampled one by one, so that no batch size matters."""

    def __init__(self, *arguments: Any, order: Order):
        super().__init__(*arguments)
        self.order = order
        if self.embeddings is not None:  # of the very names, where ours are of names as they are spoken
            self.embeddings = self.engine.encode_classes(list(self.recipe.words))

    def sample(self, batch: Batch) -> list[labelling.SampledBatch]:
        sample = super().sample
        return [sample(single) for single in split_batch(batch)]

    def label(self, batch: Batch, sampled: list[labelling.SampledBatch]) -> list[Sample | Quarantined]:
        label = super().label
        return [result for pair in zip(split_batch(batch), sampled, strict=True) for result in label(*pair)]

    def collect(self, batch: Batch, images: Tensor, raw: Raw, *others: Any) -> list[Sample | Quarantined]:
        results = super().collect(batch, images, raw, *others)
        return [self._with_files(each, b, raw) if isinstance(each, Sample) else each for b, each in enumerate(results)]

    def _with_files(self, sample: Sample, b: int, raw: Raw) -> FiledSample:
        configs = {label: self.engine.decoders[label].config for label in raw}
        outputs = {
            # an open-vocabulary decoder has outputs for each requested word: here the one class of the image
            label: {name: value[b, 0] if configs[label].has_text else value[b] for name, value in tensors.items()}
            for label, tensors in raw.items()
        }
        contents = self.order.files(sample.request.index, sample.image, outputs, configs)
        return FiledSample(**{each.name: getattr(sample, each.name) for each in fields(sample)}, files=contents)


def split_batch(batch: Batch) -> list[Batch]:
    """A batch as batches of one, without its padding."""
    return [Batch(batch.index, (request,)) for request in batch.requests]


def spec_of(order: Order, stored: Mapping[str, Any] | None) -> RunSpec:
    """The run of an order; its files and its prompts decide which run folders it may resume."""
    line, spec = order.line, read_spec(order.config, order.source)
    choices = {"script": line.script} | {name: line[name] for name in ("thread_num", "seed")}
    choices |= dict.fromkeys(("all", "fixed", "strict"), False)  # modes of earlier versions
    names = json.dumps([[item.stem, item.seed] for item in order.items]).encode()
    identity = {**spec.identity, "showlab": {"names": f"sha256:{hashlib.sha256(names).hexdigest()}", **choices}}
    if stored is not None:  # the networks process one image at a time: results are equal
        identity["batch_size"] = stored["config"]["batch_size"]
    return replace(spec, identity=identity, may_mix=False)


def open_order(order: Order) -> tuple[RunSpec, Mapping[str, Any] | None, Result | None]:
    """The run of an order, its run.json, and the result if nothing is missing; files of another run are refused."""
    check_output("--outdir", str(order.out), "folder")
    stored = read_document(order.run_folder)
    spec = spec_of(order, stored)
    if stored is not None:
        check_same(spec.folder, {"config": stored["config"]}, {"config": comparable_settings(spec, stored)})
        if missing_files(order):
            return spec, stored, None
        return spec, stored, settle(spec.folder, stored, spec.number, is_dry=order.line["dry_run"])
    for folder in (order.out / name for name in (IMAGES, order.script.folder)):
        if folder.is_dir() and any(path.name != RUN and not storage.is_temporary(path) for path in folder.iterdir()):
            raise Refused(
                f"--outdir {order.out}: {folder} holds files of another run, and nothing is overwritten",
                "Choose another --outdir.",
            )
    return spec, None, None


def prepare(order: Order, spec: RunSpec, stored: Mapping[str, Any] | None) -> Job:
    """The job of an order, checked in full, before anything is written."""
    remedy = "Name the file with the weights of the decoder."
    check_present(order.line.path("grounding_ckpt"), "--grounding_ckpt", remedy)
    job = prepare_job(spec, stored)
    line = {"script": order.line.script, "values": dict(order.line.values)}
    document = job.document | {"command": COMMAND, "line": line}
    return replace(job, document=document, generator=partial(FilingGenerator, order=order))


def missing_files(order: Order) -> list[int]:
    """The samples of the run folder of which a file below the output is missing."""
    ledger = order.run_folder / LEDGER
    if not ledger.exists():
        return []
    with Ledger(ledger, read_only=True) as opened:
        indices = sorted(opened.indices(DONE))
    return [k for k in indices if not all((order.out / name).is_file() for name in order.names(k))]


def make(order: Order, job: Job, **callbacks: Any) -> Result:
    """Makes missing samples and files; the files of a sample are on the disk before the sample counts as made."""
    missing = missing_files(order)

    def publish(results: Sequence[Sample | Quarantined]) -> None:
        made = [each for each in results if isinstance(each, FiledSample)]
        storage.publish({order.out / name: data for each in made for name, data in each.files.items()})

    result = write_missing(job, before_commit=publish, **callbacks)
    storage.remove_temporaries(order.out, apart=order.run_folder)  # after a run that let no other process in
    for index in sorted({k // job.plan.batch_size for k in missing}):
        ((_, results),) = driver.generate([job.plan.batch(index)], job.engine, job.recipe, make=job.generator)
        publish([each for each in results if each.request.index in missing])
    return result


def rows(order: Order, job: Job) -> Iterator[str]:
    """The lines of the table."""
    line, items = order.line, order.items
    seeds = sorted(item.seed for item in items)
    processes = f"--thread_num {line['thread_num']} processes"
    yield _row("settings", f"{len(items)} images, seeds {seeds[0]} to {seeds[-1]}: those of {processes}")
    count = order.script.count
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
