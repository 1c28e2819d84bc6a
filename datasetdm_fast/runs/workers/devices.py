"""Which devices and cores the processes of a run use, and which process this is where several were started."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from datasetdm_fast.cores import count_cores
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_settings import WorkerSettings


@dataclass(frozen=True)
class Pool:
    """The workers of a cluster, and what each of them asks it for."""

    workers: int
    gpus: int
    cpus: float
    threads: int


def pool_of(settings: WorkerSettings, device: str, threads: int, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """The workers that --gpus or --ranks ask for, on machines with these resources."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    hosts = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    _check_one_of_two(settings)
    if device != "cpu" and (settings.gpus or gpus and not settings.ranks):
        if settings.gpus not in ("", "all") and not (settings.gpus.isdecimal() and int(settings.gpus)):
            raise Refused(f"--gpus {settings.gpus}: a cluster chooses the GPUs itself", "Give their number, or all.")
        workers = int(settings.gpus) if settings.gpus.isdecimal() else gpus
        if not workers:
            raise Missing(f"--gpus {settings.gpus}: the cluster has no GPU now", "Say how many it may start: --gpus N")
        return Pool(workers, 1, 1, threads or _power_of_two(sum(hosts) // max(gpus, 1)))
    workers = settings.ranks or len(hosts)
    threads = threads or _power_of_two(min(sum(hosts) // workers, *hosts))
    return Pool(workers, 0, threads if workers * threads <= sum(hosts) else sum(hosts) / workers, threads)


def _power_of_two(cores: int) -> int:
    """As work divided into equal parts rounds alike for most numbers of threads."""
    return 1 << max(cores, 1).bit_length() - 1


@dataclass(frozen=True)
class Place:
    """Where one process of a run works."""

    environment: Mapping[str, str] = field(default_factory=dict)
    threads: int = 0


def find_places(settings: WorkerSettings, device: str, threads: int) -> list[Place]:
    """The places --gpus or --ranks ask for; none where neither does."""
    _check_one_of_two(settings)
    if settings.gpus:
        chosen = select_gpus(settings.gpus, visible_gpus())
        if device not in ("auto", "cuda"):
            raise Refused(
                f"--gpus {settings.gpus} --device {device}: they name different devices", "Give one of the two."
            )
        threads = threads or max(count_cores() // len(chosen), 1)
        return [Place({"CUDA_VISIBLE_DEVICES": name, "OMP_NUM_THREADS": str(threads)}, threads) for name in chosen]
    threads = threads or share_of_cores(settings.ranks) if settings.ranks else 0
    return [Place({"OMP_NUM_THREADS": str(threads)}, threads)] * settings.ranks


def _check_one_of_two(settings: WorkerSettings) -> None:
    if settings.gpus and settings.ranks:
        both = f"--gpus {settings.gpus} --ranks {settings.ranks}"
        raise Refused(f"{both}: both set the number of processes, and there is one per GPU", "Give one of the two.")


def share_of_cores(ranks: int, shared: int = 0) -> int:
    """Threads of each of so many processes, a power of two; `shared` are the cores of all, where each may have been
    started on cores of its own.
    """
    cores, requested = count_cores(), os.environ.get("OMP_NUM_THREADS", "")
    most = int(requested) if requested.isdecimal() and int(requested) else cores
    return _power_of_two(min(max(shared, cores) // ranks, cores, most))


@dataclass(frozen=True)
class LaunchedProcess:
    """This process among those of its run, as whatever started them counts."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    cores: int = 0  # of all of them on this machine, where what started them counts these

    @property
    def is_on_several_machines(self) -> bool:
        return self.local_world < self.world


def find_peer(environment: Mapping[str, str] = os.environ) -> LaunchedProcess | None:
    """This process as torchrun's variables, or those of a Slurm step, describe it; None where it was started alone."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        # A batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process; only a step says how many tasks it
        # has.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ):
        # tasks of several nodes are written 4(x2),3
        values = [re.match(r"\d+", environment.get(name, "")) for name in names]
        if all(values):
            cores = int(environment.get("SLURM_CPUS_ON_NODE") or 0) if names[0] == "SLURM_PROCID" else 0
            peer = LaunchedProcess(*(int(value[0]) for value in values), cores)
            return peer if peer.world > 1 else None
    return None


def take_share(peer: LaunchedProcess, workers: WorkerSettings, device: str, threads: int) -> int:
    """The threads of this peer, its part of the cores of its machine; where there are GPUs, it takes one of its own."""
    for name in ("gpus", "ranks"):
        if getattr(workers, name):
            raise Refused(
                f"--{name} {getattr(workers, name)}: this is one of {peer.world} processes that were started together",
                "Drop the flag.",
            )
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if len(gpus) > 1:  # where there is one, whatever started the process has chosen it
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[peer.local_rank % len(gpus)]
    return threads or share_of_cores(peer.local_world, peer.cores)


def select_gpus(selection: str, visible: Sequence[str]) -> list[str]:
    """The visible GPUs that the value of --gpus selects."""
    if selection == "all":
        numbers = list(range(len(visible)))
    elif selection.isdecimal() and int(selection):
        numbers = list(range(int(selection)))
    else:
        words = [word.strip() for word in selection.split(",") if word.strip()]
        if selection == "0" or not words or not all(map(str.isdecimal, words)) or len(set(words)) < len(words):
            raise Refused(
                f"--gpus {selection}: expected all, a number from 1, or a list of different numbers such as 0,2,5",
                "Write a list of one GPU with a comma, as 3,",
            )
        numbers = [int(word) for word in words]
    if not visible or max(numbers, default=0) >= len(visible):
        raise Missing(
            f"--gpus {selection}: this machine has {count_noun(len(visible), 'GPU')}",
            "Ask for fewer, or see CUDA_VISIBLE_DEVICES; --ranks N shares a CPU.",
        )
    return [visible[number] for number in numbers]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if count and names and all(name.startswith("MIG-") for name in names):  # of which CUDA counts the first alone
        return names
    return names[:count] if names else [str(number) for number in range(count)]
