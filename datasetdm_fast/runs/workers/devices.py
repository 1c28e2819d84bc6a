"""Which devices and cores the processes of a run use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from datasetdm_fast.cores import count_cores
from datasetdm_fast.engine.engines.hardware import choose, visible_gpus
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_settings import RunConfig


@dataclass(frozen=True)
class Pool:
    """The workers of a cluster, and what each of them asks it for."""

    workers: int
    gpus: int
    cpus: float
    threads: int


def pool_of(config: RunConfig, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """The workers a configuration asks for, on machines with these resources."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    hosts = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    _check_one_of_two(config)
    if config.device != "cpu" and (config.gpus or gpus and not config.ranks):
        if config.gpus not in ("", "all") and not (config.gpus.isdecimal() and int(config.gpus)):
            raise Refused(f"--gpus {config.gpus}: a cluster chooses the GPUs itself", "Give their number, or all.")
        workers = int(config.gpus) if config.gpus.isdecimal() else gpus
        if not workers:
            raise Missing(f"--gpus {config.gpus}: the cluster has no GPU now", "Say how many it may start: --gpus N")
        return Pool(workers, 1, 1, config.threads or _power_of_two(sum(hosts) // max(gpus, 1)))
    workers = config.ranks or len(hosts)
    threads = config.threads or _power_of_two(min(sum(hosts) // workers, *hosts))
    return Pool(workers, 0, threads if workers * threads <= sum(hosts) else sum(hosts) / workers, threads)


def _power_of_two(cores: int) -> int:
    """As work divided into equal parts rounds alike for most numbers of threads."""
    return 1 << max(cores, 1).bit_length() - 1


@dataclass(frozen=True)
class Place:
    """Where one process of a run works."""

    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0


def places(config: RunConfig) -> list[Place]:
    """The places --gpus or --ranks ask for; none where neither does."""
    _check_one_of_two(config)
    if config.gpus:
        chosen = choose(config.gpus, visible_gpus())
        if config.device not in ("auto", "cuda"):
            raise Refused(
                f"--gpus {config.gpus} --device {config.device}: they name different devices", "Give one of the two."
            )
        threads = config.threads or max(count_cores() // len(chosen), 1)
        return [Place({"CUDA_VISIBLE_DEVICES": name, "OMP_NUM_THREADS": str(threads)}, threads) for name in chosen]
    threads = config.threads or share_of_cores(config.ranks) if config.ranks else 0
    return [Place({"OMP_NUM_THREADS": str(threads)}, threads)] * config.ranks


def _check_one_of_two(config: RunConfig) -> None:
    if config.gpus and config.ranks:
        both = f"--gpus {config.gpus} --ranks {config.ranks}"
        raise Refused(f"{both}: both set the number of processes, and there is one per GPU", "Give one of the two.")


def share_of_cores(ranks: int) -> int:
    """Threads of each of so many processes, a power of two."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    most = min(max(count_cores() // ranks, 1), int(asked) if asked.isdecimal() and int(asked) else count_cores())
    return _power_of_two(most)
