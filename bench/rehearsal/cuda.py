"""torch.cuda as a rehearsal has it: streams, events and graphs that only keep order, and thread pools whose work waits
until somebody asks for it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.rehearsal.roofline import CORES
from bench.rehearsal.timeline import POLLS, Clock, HostThread, Operation, StreamId, Timeline, line_of_ours
from datasetdm_fast.engine.engines import cuda_graph
from datasetdm_fast.engine.loop import driver

GPUS = 2
THREADS = 16  # cores of a GPU's machine
MEMORY = 80 * 2**30
CARDS = {
    (8, 0): "NVIDIA A100-SXM4-80GB",
    (9, 0): "NVIDIA H100 80GB HBM3",
    (10, 0): "NVIDIA B200",
    (12, 0): "NVIDIA RTX PRO 6000 Blackwell Server Edition",
}  # by compute capability
CAPABILITY = (9, 0)  # where no other is asked for
LABELS = "labels"  # the pool whose thread reads labels


GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # in libc10: a pointer for every type of device
TYPES, CUDA_TYPE, META_TYPE = 20, 1, 14


@contextmanager
def guarded() -> Iterator[None]:
    """PyTorch built without CUDA has nobody to ask for the current GPU, and refuses to index a tensor there; meanwhile
    the one of the meta device answers, which does nothing.
    """
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * TYPES).in_dll(library, GUARDS)
    before, guards[CUDA_TYPE] = guards[CUDA_TYPE], guards[META_TYPE]
    try:
        yield
    finally:
        guards[CUDA_TYPE] = before


@contextmanager
def simulated(timeline: Timeline, capability: tuple[int, int] = CAPABILITY) -> Iterator[None]:
    """torch.cuda with GPUS cards whose work is noted in `timeline`; all is as before when the block ends."""

    def keep(value: torch.Tensor, stream: Any) -> None:
        timeline.keep(value, stream.id)

    own = SimpleNamespace(**_cards(timeline, capability), **_streams(timeline))
    with ExitStack() as stack:
        for name, value in vars(own).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", keep))
        stack.enter_context(mock.patch.object(torch, "get_num_threads", lambda: THREADS))
        stack.enter_context(mock.patch.object(torch, "set_num_threads", lambda count: None))
        stack.enter_context(mock.patch.object(threading.Barrier, "wait", lambda barrier, timeout=None: 0))
        stack.enter_context(deferred_pools(timeline))
        stack.enter_context(guarded())
        yield


def _cards(timeline: Timeline, capability: tuple[int, int]) -> dict[str, Any]:
    class OnDevice:
        """torch.cuda.device: another current GPU for a while."""

        def __init__(self, device):
            self.index = _index(device, timeline)

        def __enter__(self):
            self.before, timeline.thread.device = timeline.thread.device, self.index

        def __exit__(self, *_):
            timeline.thread.device = self.before

    def device_of(value: torch.Tensor) -> OnDevice:
        return OnDevice(value.device if value.device.type == "cuda" else None)

    def asked(name: str, answer: Any) -> Callable[..., Any]:
        def call(device: Any = None) -> Any:
            timeline.is_at_home(f"torch.cuda.{name}() asks", _index(device, timeline))
            return answer

        return call

    def chosen(device: Any) -> None:
        timeline.thread.device = _index(device, timeline)
        timeline.is_at_home("torch.cuda.set_device() asks for work", timeline.thread.device)

    answers = {
        "get_device_name": CARDS[capability],
        "get_device_capability": capability,
        "get_device_properties": SimpleNamespace(multi_processor_count=CORES),
        "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0,
        "max_memory_allocated": MEMORY // 2,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
    }
    return {
        **{name: asked(name, answer) for name, answer in answers.items()},
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: GPUS,
        "is_bf16_supported": lambda including_emulation=True: True,
        "current_device": lambda: timeline.thread.device,
        "set_device": chosen,
        "device": OnDevice,
        "device_of": device_of,
    }


def _index(device: Any, timeline: Timeline) -> int:
    index = device if isinstance(device, int) else None if device is None else torch.device(device).index
    return timeline.thread.device if index is None or index < 0 else index


def _streams(timeline: Timeline) -> dict[str, Any]:
    class Stream:
        def __init__(self, device=None, *, id: StreamId | None = None, **_):
            self.id = id or timeline.new_stream(_index(device, timeline))
            self.device, self.cuda_stream = torch.device("cuda", self.id[0]), self.id[1]

        def wait_stream(self, other: Stream) -> None:
            timeline.wait(self.id, timeline.reached(other.id))

        def wait_event(self, event: Event) -> None:
            event.has_to_be_recorded()
            timeline.wait(self.id, event.clock, f", for an event of {event.line}")

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            timeline.host_waits_for(f"stream {self.id}", self.id)

        def query(self) -> bool:
            return timeline.is_over(f"stream {self.id}", timeline.reached(self.id))

    class Event:
        def __init__(self, *_, **__):
            self.clock: Clock = {}
            self.line, self.is_recorded = "nowhere", False

        def record(self, stream: Stream | None = None) -> None:
            id = (stream or current()).id
            timeline.is_at_home("an event is recorded", id[0])
            self.clock, self.line, self.is_recorded = timeline.reached(id), line_of_ours(sys._getframe(1)), True

        def has_to_be_recorded(self) -> None:
            if not self.is_recorded:
                timeline.find("race", "an event that was never recorded is waited for, so nothing is")

        def wait(self, stream: Stream | None = None) -> None:
            (stream or current()).wait_event(self)

        def synchronize(self) -> None:
            self.has_to_be_recorded()
            timeline.host_waits("an event", self.clock)

        def query(self) -> bool:
            return timeline.is_over("an event", self.clock)

    class use:  # noqa: N801, the name and the shape of torch.cuda.stream
        def __init__(self, stream: Stream | None):
            self.stream = stream

        def __enter__(self):
            if self.stream is not None:
                thread, (device, number) = timeline.thread, self.stream.id
                self.before = thread.device, thread.streams.get(device, 0)
                thread.device, thread.streams[device] = device, number

        def __exit__(self, *_):
            if self.stream is not None:
                timeline.thread.streams[self.stream.id[0]] = self.before[1]
                timeline.thread.device = self.before[0]

    def current(device=None) -> Stream:
        return Stream(id=timeline.thread.stream(_index(device, timeline)))

    def synchronize(device=None) -> None:
        wait_for_all("torch.cuda.synchronize()", device)

    def wait_for_all(what: str, device=None) -> None:
        index = _index(device, timeline)
        timeline.host_waits_for(what, *(stream for stream in timeline.counts if stream[0] == index))

    class SimulatedGraph:
        def __init__(self, keep_graph: bool = False):
            self.launches: list[Operation] = []
            self.stream: StreamId | None = None
            self.pool: Any = None

        def replay(self) -> None:
            if not self.launches:
                timeline.find("empty graph", "a graph that recorded nothing is replayed")
            stream = timeline.thread.stream(timeline.thread.device)
            if self.stream is not None and self.stream[0] != stream[0]:
                timeline.find("wrong GPU", f"a graph of GPU {self.stream[0]} is replayed on GPU {stream[0]}")
            reads = {number for launch in self.launches for number in launch.reads}
            writes = {number for launch in self.launches for number in launch.writes}
            timeline.recorded(reads | writes)
            timeline.overwritten(writes)
            kernels = sum(launch.kernels for launch in self.launches)
            timeline.use(stream, reads, writes | {timeline.pool(self.pool, stream[0])}, kernels)
            timeline.replays += 1

        def reset(self) -> None:
            pass

    class Recording:
        """torch.cuda.graph; left out, its stream is one of the GPU that recorded first, as in PyTorch."""

        shared: Stream | None = None

        def __init__(
            self, graph: SimulatedGraph, pool=None, stream: Stream | None = None, capture_error_mode: str = "global"
        ):
            if stream is None:
                Recording.shared = Recording.shared or Stream()
                stream = Recording.shared
            self.graph, self.stream = graph, use(stream)
            graph.stream, graph.pool = stream.id, pool or object()
            if capture_error_mode == "global" and timeline.is_threaded:
                timeline.find("capture", "a recording in mode global fails by what other threads ask of a GPU")

        def __enter__(self):
            if timeline.capture is not None:
                timeline.find("capture", "a second graph is recorded while another one is")
            card = self.graph.stream[0]
            for pool in () if cuda_graph.TURN._is_owned() else timeline.pools.values():
                works_here = any(card in thread.cards for thread in pool.threads)
                if pool.queue and pool.records and works_here and timeline.thread not in pool.threads:
                    timeline.find("capture", f"a graph is recorded while the thread {pool.name} may record one, too")
            timeline.records(self.graph.pool, self.graph.stream)
            timeline.host_waits(
                "the start of a recording", timeline.reached(timeline.thread.stream(self.graph.stream[0]))
            )
            self.stream.__enter__()
            timeline.capture = self.graph

        def __exit__(self, *_):
            timeline.capture = None
            self.stream.__exit__()
            if not self.graph.launches:
                timeline.find("empty graph", "nothing was recorded")

    return {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": SimulatedGraph,
        "stream": use,
        "graph": Recording,
        "current_stream": current,
        "default_stream": lambda device=None: Stream(id=(_index(device, timeline), 0)),
        "synchronize": synchronize,
        "empty_cache": lambda: wait_for_all("torch.cuda.empty_cache()"),  # giving memory back waits for the GPU
        "graph_pool_handle": object,
        "is_current_stream_capturing": lambda: timeline.capture is not None,
    }


class DeferredFuture(Future):
    """Work of a pool's thread. It runs as late as possible: where its result is asked for, or at the pool's end."""

    def __init__(self, pool: DeferredPool, work: Callable[[], Any], clock: Clock, phase: str):
        super().__init__()
        self.pool, self.work, self.clock, self.phase = pool, work, clock, phase
        self.asked = 0

    def done(self) -> bool:
        self.asked += 1
        if self.asked >= POLLS:  # by a loop that waits for it
            self.pool.run_until(self)
        return self.asked >= POLLS

    def result(self, timeout: float | None = None) -> Any:
        self.pool.run_until(self)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.pool.run_until(self)
        return super().exception(timeout)


class DeferredPool:
    """The queue and the threads behind one ThreadPoolExecutor."""

    def __init__(self, timeline: Timeline, name: str, workers: int):
        self.timeline, self.queue, self.name = timeline, deque(), name
        self.records = name == LABELS  # the other pools use no network
        self.threads = deque(HostThread(f"{name} {place}" if workers > 1 else name) for place in range(workers))

    def run_until(self, last: DeferredFuture) -> None:
        """Runs the queue in order up to `last`; the thread that asks then knows what its thread knew at its end."""
        while not Future.done(last) and self.queue:
            self.run(self.queue.popleft())
        self.timeline.wait_for(last.clock)

    def run(self, one: DeferredFuture) -> None:
        thread = self.threads[0]
        self.threads.rotate(-1)
        self.timeline.knows(thread, one.clock)
        work, one.work = one.work, None
        with self.timeline.on_thread(thread, one.phase):
            try:
                one.set_result(work())
            except BaseException as error:
                one.set_exception(error)
            del work
        one.clock = dict(thread.clock)


@contextmanager
def deferred_pools(timeline: Timeline) -> Iterator[None]:
    """Every ThreadPoolExecutor runs its work in this thread, as if in threads of its own."""

    pools: dict[int, DeferredPool] = timeline.pools

    def submit(executor: ThreadPoolExecutor, work: Callable, /, *arguments: Any, **named: Any) -> DeferredFuture:
        name = executor._thread_name_prefix or "pool"
        pool = pools.setdefault(id(executor), DeferredPool(timeline, name, executor._max_workers))
        one = DeferredFuture(pool, lambda: work(*arguments, **named), dict(timeline.thread.clock), timeline.phase)
        timeline.is_threaded = True
        pool.queue.append(one)
        return one

    def shutdown(executor: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pool = pools.pop(id(executor), None)
        while pool and pool.queue and not cancel_futures:
            pool.run(pool.queue.popleft())

    def wait(futures) -> None:
        for future in futures:
            if isinstance(future, DeferredFuture):
                future.exception()

    with (
        mock.patch.object(ThreadPoolExecutor, "submit", submit),
        mock.patch.object(ThreadPoolExecutor, "shutdown", shutdown),
        mock.patch.object(driver, "wait", wait),
    ):
        yield
