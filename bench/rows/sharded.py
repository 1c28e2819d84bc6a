"""python -m bench scale: what a run in shards costs the process that supervises it and those that read it, by the
number of its samples, which are copied from a few hundred real ones.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.machine.machine import describe
from bench.machine.measure import mib, status
from bench.machine.processes import another_process
from datasetdm_fast import generate
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.run_settings import complete_settings, read_spec
from datasetdm_fast.runs.gallery.showing import show
from datasetdm_fast.runs.jobs.writing import result_of
from datasetdm_fast.runs.run_folder.document import MANIFEST
from datasetdm_fast.runs.run_folder.folder import DETAILS_NAME, PAGE_NAME, PAGE_SAMPLES
from datasetdm_fast.runs.run_folder.ledger import Row
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_folder.shard_places import shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.runs.workers import shard_worker
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.spawn import run_ranks
from datasetdm_fast.runs.workers.worker import Callbacks
from datasetdm_fast.settings import setting

SMALL = {"size": 64, "image_format": "jpg", "task": ("semantic", "instance"), "steps": 4}  # so that a million fit


@dataclass(frozen=True)
class ScaleConfig:
    samples: tuple[str, ...] = setting(("10000", "100000"), "samples of each run that is measured", metavar="LIST")
    copied: int = setting(300, "real samples that they are copied from", metavar="N", least=1)
    ranks: int = setting(2, "processes that copy", metavar="N", least=1)
    shard_size: int = setting(0, "samples of a shard; 0: as generate has them", metavar="N", least=0)
    folder: str = setting("", "folder for the runs, which are removed; 10 GB for a million", metavar="DIR")


def config_of(out: Path, number: int, size: int) -> RunConfig:
    shards = {"layout": "shards", "shard_size": size}
    return RunConfig(out=str(out), number=number, batch_size=8, engine="fast", quiet=True, **shards, **SMALL)


def copy_samples(base: str) -> None:
    """In the process of a worker: has it copy the samples of a run in place of making them."""
    run = open_run(base)
    real = [(sample.row, {role: sample.read(role) for role in sample.row.files}) for sample in run]

    def copies(worker: shard_worker.ShardWorker, indices: Sequence[int]) -> Iterator[shard_worker.Encoded]:
        for index in indices:
            row, contents = real[index % len(real)]
            worker.claims.renew()
            yield renumber(row, index), contents

    shard_worker.ShardWorker._encode_samples = copies
    shard_worker.check_room = lambda folder, needed: None  # reckons with files as large as they can be


def renumber(row: Row, index: int) -> Row:
    """The row as that of another sample."""
    request = replace(row.request, index=index, seed=index)
    files = {
        role: file._replace(path=file.path.replace(row.request.id, request.id)) for role, file in row.files.items()
    }
    return replace(row, request=request, files=files)


def supervise(base: str, out: str, number: int, ranks: int, size: int) -> dict[str, Any]:
    """What a run costs its supervisor; to be called in a process of its own."""
    spec = replace(read_spec(complete_settings(config_of(Path(out), number, size), {"out", "task"})), may_mix=False)
    ledger = ShardLedger(shard_place(out), counts_only=True)
    callbacks = Callbacks(on_start=partial(copy_samples, base))
    before, begin, cores = mib(status("VmRSS")), time.time(), time.process_time()
    run_ranks([Place({"OMP_NUM_THREADS": "1"}, 1)] * ranks, spec, ledger, callbacks)
    document = shard_worker.read_stored(ledger.place)
    assert document is not None
    result = result_of(Path(out), document, number, ledger, number, seconds=1.0)
    end, cores = time.time(), time.process_time() - cores
    assert result.is_complete
    last = max(path.stat().st_mtime for path in Path(out, MANIFEST).iterdir())
    return {
        "seconds": round(end - begin, 1),
        "supervisor_core_ms_per_sample": round(1e3 * cores / number, 5),
        "supervisor_grew_mib": round(mib(status("VmRSS")) - before, 1),
        "seconds_from_last_sample_to_end": round(end - last, 2),
        "bytes_per_sample": {
            name: round(sum(path.stat().st_size for path in Path(out).glob(files)) / number, 1)
            for name, files in {"tar": "shards/*.tar", "index": "shards/*.parquet", "manifest": "manifest/*"}.items()
        },
    }


def read(out: str, number: int) -> dict[str, Any]:
    """How long reading takes; to be called in a process of its own."""
    seconds, begin = {}, time.perf_counter()

    def note(name: str) -> None:
        nonlocal begin
        seconds[name] = round(time.perf_counter() - begin, 3)
        begin = time.perf_counter()

    run = open_run(out)
    assert len(run) == number
    note("open")
    assert run[number // 2].image.shape[0] == SMALL["size"]
    note("one sample")
    fetch = show(out, is_served=True).served.fetch
    assert fetch is not None
    note("gallery opened")
    for name, file in {
        "gallery page": PAGE_NAME.format((number - 1) // PAGE_SAMPLES),
        "gallery details": DETAILS_NAME.format(3),
        "gallery image": f"images/{number // 3:08d}.{SMALL['image_format']}",
    }.items():
        assert fetch(file) is not None
        note(name)
    return {"reading_seconds": seconds, "reader_mib": round(mib(status("VmRSS")), 1)}


def measure(config: ScaleConfig) -> list[dict[str, Any]]:
    """A row for each number of samples."""
    rows = []
    with tempfile.TemporaryDirectory(dir=config.folder or None) as place:
        base = f"{place}/base"
        small = {"--task": ",".join(SMALL["task"]), "--size": SMALL["size"], "--steps": SMALL["steps"]}
        small |= {"--image-format": SMALL["image_format"], "--number": config.copied, "--out": base}
        flags = [str(part) for pair in small.items() for part in pair]
        assert generate.main([*flags, "--force-domain", "--quiet"]) == 0  # the decoders know larger pictures
        for number in map(int, config.samples):
            with tempfile.TemporaryDirectory(dir=place) as out:
                row: dict[str, Any] = {"samples": number}
                with another_process() as pool:
                    row |= pool.submit(supervise, base, f"{out}/run", number, config.ranks, config.shard_size).result()
                with another_process() as pool:
                    row |= pool.submit(read, f"{out}/run", number).result()
            print(json.dumps(row), file=sys.stderr)
            rows.append(row)
    return rows


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, ScaleConfig, "python -m bench scale", __doc__)
    rows = measure(config)
    head = {"command": f"python -m bench scale {' '.join(arguments)}", "machine": describe(torch.device("cpu"))}
    print(json.dumps({**head, "rows": rows}, indent=1))
    return 0
