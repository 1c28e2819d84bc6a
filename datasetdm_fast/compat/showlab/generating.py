"""A line of a generator becomes an ordinary run, whose samples also leave the files that DatasetDM writes."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.command_line.outputs import check_output
from datasetdm_fast.compat.showlab.checkout import present
from datasetdm_fast.compat.showlab.order import RUN, Order
from datasetdm_fast.data import Batch, Quarantined, Sample
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.engines import opening
from datasetdm_fast.engine.loop import driver
from datasetdm_fast.engine.loop.plan import Plan
from datasetdm_fast.engine.loop.recipe import prompt_words
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.jobs.job import (
    Job,
    adopt,
    check_room,
    count_rows,
    describe,
    moved,
    recipe_of,
    row_facts,
    settled,
)
from datasetdm_fast.runs.jobs.result import Result
from datasetdm_fast.runs.jobs.run import facts_of, run
from datasetdm_fast.runs.jobs.settings import check_settings, identity
from datasetdm_fast.runs.run_folder.document import LEDGER, check_same, read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import DONE, Ledger
from datasetdm_fast.runs.run_folder.remaking import remakable

if TYPE_CHECKING:
    from torch import Tensor

    from datasetdm_fast.engine.decoders.config import DecoderConfig
    from datasetdm_fast.engine.decoders.trunk import Decoder

COMMAND = "compat.showlab"
Raw = Mapping[str, Mapping[str, "Tensor"]]  # label -> the raw answer of its decoder
# the number of an image, its pixels, raw answers, the configurations of their decoders -> files below the output
Filed = Callable[[int, np.ndarray, Raw, Mapping[str, "DecoderConfig"]], dict[str, bytes]]


@dataclass(frozen=True, repr=False)
class FiledSample(Sample):
    """A sample and the files that DatasetDM writes of it."""

    files: Mapping[str, bytes] = field(default_factory=dict)


class FilingGenerator(driver.BatchGenerator):
    """Makes DatasetDM's files of every sample from the raw answers that its labels are made of."""

    def __init__(self, *arguments: Any, order: Order, filed: Filed):
        super().__init__(*arguments)
        self.order, self.filed = order, filed
        if self.words.embeddings is not None:  # of the very names, where ours are of names as they are spoken
            self.words.embeddings = self.engine.encode_classes(list(self.recipe.words))
        self._moving = MovingNorms(self.engine.decoders) if order.line["strict"] else None

    def label(self, batch: Batch, drawn: driver.SampledBatch) -> list[Sample | Quarantined]:
        if self._moving:
            item = self.order.items[batch.requests[0].index]
            self._moving.be_at(item.process, item.place)
        return super().label(batch, drawn)

    def collected(
        self,
        batch: Batch,
        images: Tensor,
        raw: dict[str, dict[str, Tensor]],
        checks: dict[str, Tensor],
        drawn: driver.SampledBatch,
    ) -> list[Sample | Quarantined]:
        results = super().collected(batch, images, raw, checks, drawn)
        return [self._with_files(one, b, raw) if isinstance(one, Sample) else one for b, one in enumerate(results)]

    def _with_files(self, sample: Sample, b: int, raw: Raw) -> FiledSample:
        configs = {label: self.engine.decoders[label].config for label in raw}
        own = {
            # a decoder of words answers for each word it is asked for: here the one class of the image
            label: {name: value[b, 0] if configs[label].has_text else value[b] for name, value in answer.items()}
            for label, answer in raw.items()
        }
        made = self.filed(sample.request.index, sample.image, own, configs)
        return FiledSample(**{each.name: getattr(sample, each.name) for each in fields(sample)}, files=made)


class SingleGenerator(FilingGenerator):
    """Samples and labels each image of a batch by itself, so that the size of batches changes no byte."""

    def sample(self, batch: Batch) -> list[driver.SampledBatch]:
        sample = super().sample
        return [sample(one) for one in singles(batch)]

    def label(self, batch: Batch, drawn: list[driver.SampledBatch]) -> list[Sample | Quarantined]:
        label = super().label
        return [result for one, own in zip(singles(batch), drawn, strict=True) for result in label(one, own)]


def singles(batch: Batch) -> list[Batch]:
    """A batch as batches of one, without its padding."""
    return [Batch(batch.index, (request,)) for request in batch.requests]


class MovingNorms:
    """Spectral norms of decoders in training mode, which move with every image of a process."""

    def __init__(self, decoders: Mapping[str, Decoder]):
        self.decoders = decoders
        self.first = {label: copy.deepcopy(decoder.state_dict()) for label, decoder in decoders.items()}
        self.next: tuple[int, int] | None = None

    def be_at(self, process: int, place: int) -> None:
        """Puts the norms where they stand before an image: they move by their weights alone, whatever is shown."""
        from datasetdm_fast.engine.decoders.layers import SpectralConv2d

        if self.next != (process, place):
            for label, decoder in self.decoders.items():
                decoder.load_state_dict(self.first[label])
                for module in decoder.modules():
                    for _ in range(place if isinstance(module, SpectralConv2d) else 0):
                        module.normalised()
        self.next = process, place + 1


def identity_of(order: Order) -> dict[str, Any]:
    """The settings that decide the bytes of what is made, without a look at weights."""
    line = order.line
    choices = {"script": line.script} | {name: line[name] for name in ("thread_num", "seed", "all", "fixed", "strict")}
    choices |= {"together": True} if line["together"] else {}
    names = [[item.stem, item.seed] for item in order.items]
    plan = {"names": _digest(names), **choices}
    return identity(order.config, order.source) | {"showlab": plan}


def _digest(value: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(value).encode()).hexdigest()}"


def begun(order: Order, folders: Iterable[str]) -> dict[str, Any] | None:
    """The description of the run that an output holds, if any; files of another run are refused."""
    check_output("--outdir", str(order.out), "folder")
    check_settings(order.config)
    stored = read_document(order.run_folder)
    if stored is not None:
        wanted = identity_of(order) | moved(order.config, stored)
        if not order.line["together"]:  # the networks process one image at a time, so it changes no byte
            wanted["batch_size"] = stored["config"]["batch_size"]
        check_same(order.run_folder, {"config": stored["config"]}, {"config": wanted})
        return stored
    for folder in (order.out / name for name in folders):
        if folder.is_dir() and any(path.name != RUN and not storage.is_temporary(path) for path in folder.iterdir()):
            raise Refused(
                f"--outdir {order.out}: {folder} holds files of another run, and nothing is overwritten",
                "Choose another --outdir.",
            )
    return None


def prepare(order: Order, filed: Filed, stored: Mapping[str, Any] | None) -> Job:
    """The job of a line, checked in full; nothing is written."""
    config = order.config
    for _, flag in order.checkpoints.values():
        present(order.line.path(flag), f"--{flag}", "Name the file with the weights of the decoder.")
    chosen = config.engine_choices()
    engine, decoders = opening.open_engine(
        config.model, config.decoder, config.task, size=config.size, strict=order.line["strict"], **chosen
    )
    check_decoder(order, engine.decoders)
    recipe = recipe_of(config, engine, order.words)
    words = recipe.words or prompt_words(engine, config.task, ())
    size = config.batch_size or (
        stored["plan"]["batch_size"] if stored else min(engine.suggested_batch(), len(order.items))
    )
    given, source = [order.given(item) for item in order.items], order.source
    plan = Plan(given.__getitem__, words, len(given), config.seed, size, source.digest, len(given), has_seeds=True)
    document = describe(identity_of(order), plan, engine, recipe, decoders)
    document |= {"command": COMMAND, "line": {"script": order.line.script, "values": dict(order.line.values)}}
    recipe = replace(recipe, facts=row_facts(document))
    kind = FilingGenerator if order.line["together"] else SingleGenerator
    job = Job(config, plan, engine, recipe, document, 0, generator=partial(kind, order=order, filed=filed))
    if stored is not None:
        job = replace(adopt(job, stored), done=count_rows(config))
    check_room(job)
    return job


def check_decoder(order: Order, decoders: Mapping[str, Decoder]) -> None:
    """Refuses a decoder of other sizes than the configuration of the line says."""
    for label, (kind, flag) in order.checkpoints.items():
        config, path = decoders[label].config, order.line.path(flag)
        found = {"num_classes": config.logits - 1, "num_queries": config.queries} if config.has_queries else {}
        if kind == "lvis":  # ours has as many as its data, whatever a configuration says
            del found["num_classes"]
        for name, wanted in order.expected.items():
            if name in found and found[name] != wanted:
                raise Refused(
                    f"--config {order.line.path('config')}: {name} is {wanted:g}, and the weights in {path} have "
                    f"{found[name]}",
                    "Name the configuration they were trained with.",
                )


def already(order: Order, stored: Mapping[str, Any] | None, names: Callable[[int], list[str]]) -> Result | None:
    """The result of a line that has nothing left to do."""
    if stored is None or missing_files(order, names):
        return None
    return settled(order.run_folder, stored, len(order.items), is_dry=order.line["dry_run"])


def missing_files(order: Order, names: Callable[[int], list[str]]) -> list[int]:
    """The samples that are there while one of their files below the output is not."""
    ledger = order.run_folder / LEDGER
    if not ledger.exists():
        return []
    with Ledger(ledger, read_only=True) as opened:
        there = sorted(opened.indices(DONE))
    return [index for index in there if not all((order.out / name).is_file() for name in names(index))]


def make(order: Order, job: Job, names: Callable[[int], list[str]], **callbacks: Any) -> Result:
    """Makes what is missing; the files of a sample are on the disk before the sample counts as made."""
    lost = missing_files(order, names)
    publish = partial(put_files, order.out)
    result = run(job, before_commit=publish, **callbacks)
    storage.remove_temporaries(order.out, apart=order.run_folder)  # after a run that let no other process in
    for index in sorted({k // job.plan.batch_size for k in lost}):
        ((_, results),) = driver.generate([job.plan.batch(index)], job.engine, job.recipe, make=job.generator)
        publish([one for one in results if one.request.index in lost])
    return result


def put_files(out: Path, results: Sequence[Sample | Quarantined]) -> None:
    """Writes the files of samples below the output."""
    storage.publish(
        {out / name: content for one in results if isinstance(one, FiledSample) for name, content in one.files.items()}
    )


def remake(order: Order, job: Job, id: str) -> list[str]:
    """Makes one sample and its files again; the paths of those in the run folder that were missing or damaged."""
    _, row = remakable("compat.showlab", job.folder, id)
    with RunFolder(job.folder, job.document) as folder:
        batch = job.plan.batch(row.request.index // job.plan.batch_size)
        ((_, results),) = driver.generate([batch], job.engine, job.recipe, make=job.generator)
        result = next(one for one in results if one.request.index == row.request.index)
        if isinstance(result, Quarantined):
            raise GateFailed(f"sample {id}: {result.reason}; nothing was written", "Try another --dtype.")
        put_files(order.out, [result])
        return folder.renew(row, replace(result, provenance={**result.provenance, **facts_of(job.recipe, batch)}))
