"""What is ordered before what on simulated GPUs: streams, host threads and events with vector clocks, the lifetime of
every storage, and the findings.
"""

from __future__ import annotations

import linecache
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bench.machine.machine import ROOT
from bench.rehearsal.page_locked import Watch

DEEPEST, MADE = 5, 3  # lines that a finding names, and of what made a tensor
OURS = tuple(
    f"{ROOT / folder}/" for folder in ("datasetdm_fast", "kernels", "export", "bench/proof")
)  # whose lines a finding names
LOAD, WAIT, OTHERS = "load", "host wait", "wait for another thread"  # a phase, in which the host may wait, and rules
AGAIN, EARLY = ", again with nothing computed since", ", before all of a step is queued"  # of waits
NUMBER = "aten._local_scalar_dense of [] torch."  # what a wait for one begins with
COPIES = {"_to_copy", "copy_"}  # by their names as operations
POLLS = 1000  # questions whether a stream or an event is over that come to a wait for it
FIRST, BETWEEN = "batch 0", "between steps"  # phases: of what is read or recorded once, and of looks at a training
GRAPH_POOL = -1  # in the place of a stream: memory of graphs, which only they give out
StreamId = tuple[int, int]  # GPU, number on it; 0 is the default stream
Clock = dict[StreamId, int]  # stream -> launches of it that are known to be over


class Use(NamedTuple):
    """One operation on a storage: the last of its kind on its stream."""

    stream: StreamId
    count: int
    line: str


@dataclass(frozen=True)
class Flaw:
    """One thing that is wrong, and where."""

    rule: str
    what: str
    place: str  # FILE:LINE of the innermost line of ours, then the lines that called it
    function: str  # that it is in
    code: str
    thread: str
    phase: str


@dataclass(frozen=True)
class Operation:
    """One operation as the GPU would be given it."""

    name: str
    stream: StreamId
    thread: str
    phase: str
    reads: tuple[int, ...]  # numbers of storages
    writes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]  # of what it reads
    dtype: str  # of the result
    moved: int  # bytes read and written
    flops: int
    kernels: int = 1


@dataclass(eq=False)
class HostThread:
    """A thread of the process: its current GPU and streams, and what it knows to be over."""

    name: str
    clock: Clock = field(default_factory=dict)
    device: int = 0
    streams: dict[int, int] = field(default_factory=dict)
    cards: set[int] = field(default_factory=set)  # the GPUs it has launched work on
    work: str = ""  # the thread whose work this one does for a while, where it is another one's

    def stream(self, device: int) -> StreamId:
        return device, self.streams.get(device, 0)


@dataclass
class Memory:
    """One storage on a GPU, from its allocation to its release."""

    alive: StorageWeakRef
    home: StreamId  # whose pool its bytes go back to
    size: int
    phase: str
    reads: list[Use] = field(default_factory=list)
    writes: list[Use] = field(default_factory=list)
    kept_for: set[StreamId] = field(default_factory=set)  # record_stream: the allocator waits for these
    is_host: bool = False  # page-locked: its allocator waits for every copy by itself
    is_unread: bool = False  # nothing has read what was written last
    made: str = ""  # the lines that made it
    written: int = 0  # the place of its last write among all operations
    is_blank: bool = False  # allocated, and nothing has written to it yet
    name: str = ""  # where it is no single storage

    def __str__(self) -> str:
        return self.name or f"{self.size:,} bytes"


class Timeline:
    """Everything that was launched so far. Two uses of one storage are ordered only where a wait says so, whatever
    order the rehearsal itself happened to run them in.
    """

    def __init__(self):
        self.thread, self.phase = HostThread("main"), LOAD
        self.launches: list[Operation] = []
        self.found: Counter[Flaw] = Counter()
        self.capture: Any = None  # the graph that is being recorded
        self.counts: Counter[StreamId] = Counter()
        self.clocks: dict[StreamId, Clock] = {}
        self.waited: dict[StreamId, str] = {}  # the line of each stream's last wait
        self.pools: dict[int, Any] = {}  # of threads, by their executors
        self.memory: dict[int, Memory] = {}
        self.replays = 0  # of graphs
        self.is_ended = False  # by an error, after which nothing is in order
        self.is_threaded = False  # whether other threads have been given work
        self.users: dict[StreamId, set[str]] = {}  # the threads that have launched on a stream
        self.pinned: set[int] = set()  # storages of the host's page-locked memory
        self.homes: set[int] = set()  # the GPUs that the run was told to use
        self.waits: list[tuple[Flaw, int]] = []  # of the host, and what was launched before each
        self._asked: Counter[tuple] = Counter()  # how often the host asked whether this much is over
        self.arrays: dict[int, list[tuple[weakref.ref, str]]] = {}  # of the host's memory: the arrays over it
        self.watches: dict[int, list[Watch]] = {}  # the same of page-locked memory: what they show
        self._pools: dict[Any, int] = {}  # of graphs: the number of what all of a pool share
        self._recorders: dict[Any, StreamId] = {}  # of graphs: the stream on which those of a pool are recorded
        self._hosts: dict[int, tuple[StorageWeakRef, str]] = {}  # tensors of the host, and the lines that made them
        self._operations = 0
        self._shared: set[int] = set()  # storages of batches that streams other than their own have used
        self._streams = 0

    # Order ------------------------------------------------------------------------------------------------------------
    def new_stream(self, device: int) -> StreamId:
        self._streams += 1
        return device, self._streams

    def reached(self, stream: StreamId) -> Clock:
        """What is over once everything queued on a stream so far is."""
        return {**self.clocks.get(stream, {}), stream: self.counts[stream]}

    def wait(self, stream: StreamId, clock: Clock, told: str = "") -> None:
        """All that a stream is given from now on comes after `clock`; `told` says more of what it waits for."""
        merge(self.clocks.setdefault(stream, {}), clock)
        self.waited[stream] = f"{line_of_ours(sys._getframe(1))}{told}"

    def host_waits(self, what: str, clock: Clock) -> None:
        """The host waits until all of `clock` is over."""
        self.look(*list(self.watches))
        rule = "wait in a recording" if self.capture is not None else WAIT
        flaw, (before, count) = self.flaw(rule, what), (self.waits or [(None, 0)])[-1]
        since = {one.name for one in self.launches[count:]}
        if before and flaw.place == before.place and since and since <= COPIES:
            flaw = replace(flaw, what=what + AGAIN)
        self.found[flaw] += 1
        self.waits.append((flaw, len(self.launches)))
        merge(self.thread.clock, clock)

    @contextmanager
    def a_step(self) -> Iterator[None]:
        """Within the block a step of a training is queued; numbers of it are read when all of it is."""
        first = len(self.waits)
        yield
        for flaw, count in self.waits[first:]:
            if flaw.what.startswith(NUMBER) and any(one.thread == flaw.thread for one in self.launches[count:]):
                self.found[replace(flaw, what=flaw.what + EARLY)] += 1

    def host_waits_for(self, what: str, *streams: StreamId) -> None:
        """The host waits until all that was queued on these streams is over."""
        clock: Clock = {}
        for stream in streams:
            merge(clock, self.reached(stream))
            if others := sorted(self.users.get(stream, set()) - {self.thread.name}):
                self.find(OTHERS, f"{what}: stream {stream} is {', '.join(others)}'s, too")
        self.host_waits(what, clock)

    def is_over(self, what: str, clock: Clock) -> bool:
        """Whether the host knows that all of `clock` is over; a loop that asks until it is waits for it."""
        if all(self.thread.clock.get(stream, 0) >= count for stream, count in clock.items()):
            return True
        asked = self.thread.name, *sorted(clock.items())
        self._asked[asked] += 1
        if self._asked[asked] < POLLS:
            return False
        self.host_waits(f"{what}, asked {POLLS:,} times whether it is over", clock)
        return True

    def knows(self, thread: HostThread, clock: Clock) -> None:
        """A thread was started, or given work, by one that knew this to be over."""
        merge(thread.clock, clock)

    def wait_for(self, clock: Clock) -> None:
        """This thread has waited for another one, which knew this to be over."""
        merge(self.thread.clock, clock)

    @contextmanager
    def on_thread(self, thread: HostThread, phase: str = "") -> Iterator[None]:
        """The work of another host thread, which it was given in `phase`."""
        self.sweep()  # what was released so far, this thread has released
        before = self.thread, self.phase
        self.thread, self.phase = thread, phase or self.phase
        try:
            yield
        finally:
            self.sweep()
            self.thread, self.phase = before

    def read_by_host(self, value: Tensor) -> None:
        """The host reads its own memory, which a GPU may have written."""
        self._waited_for("reads", value.untyped_storage()._cdata, lambda memory: memory.writes)

    def written_by_host(self, value: Tensor) -> None:
        """The host writes its own memory, which a GPU may be reading or writing."""
        self._waited_for("writes", value.untyped_storage()._cdata, lambda memory: memory.writes + memory.reads)

    def is_written(self, value: Tensor) -> bool:
        """Whether a GPU has written to the host's memory."""
        memory = self.memory.get(value.untyped_storage()._cdata)
        return memory is not None and bool(memory.writes)

    def watch(self, value: Tensor, own: np.ndarray, content: bytearray) -> None:
        """Looks at page-locked memory whenever a GPU is given it, the host waits or the array over it is gone."""
        number = value.untyped_storage()._cdata

        def changed() -> None:
            self._waited_for("has written to", number, lambda memory: memory.writes + memory.reads)

        self.watches.setdefault(number, []).append(Watch(own, content, changed))

    def look(self, *numbers: int) -> None:
        """Asks of arrays over page-locked memory whether anything was written past them."""
        for number in numbers:
            for one in self.watches[number]:
                one.look()
            self.watches[number] = [one for one in self.watches[number] if one.alive() is not None]

    def _waited_for(self, verb: str, number: int, uses: Callable[[Memory], list[Use]]) -> None:
        memory = self.memory.get(number)
        for use in uses(memory) if memory else ():
            if self.thread.clock.get(use.stream, 0) < use.count:
                self.find(
                    "race", f"the host {verb} {memory.size:,} bytes without waiting for stream {use.stream}, {use.line}"
                )

    def viewed(self, value: Tensor, array: np.ndarray) -> None:
        """An array of the host over the memory of a tensor that a GPU has written."""
        number = value.untyped_storage()._cdata
        if number in self.memory:
            self.arrays.setdefault(number, []).append((weakref.ref(array), line_of_ours(sys._getframe(1))))

    # Launches ---------------------------------------------------------------------------------------------------------
    def launch(
        self,
        name: str,
        device: int,
        reads: Iterable[Tensor],
        writes: Iterable[Tensor],
        *,
        flops: int = 0,
        moved: int = 0,
        kernels: int = 1,
    ) -> None:
        self.sweep()
        stream, reads, writes = self.thread.stream(device), list(reads), list(writes)
        if self.capture is not None and self.capture.stream != stream:
            self.find("wrong GPU", f"{name} runs on stream {stream}, the graph records {self.capture.stream}")
        self.is_at_home(f"{name} runs", device)
        if self.phase != LOAD and any(value.dtype == torch.float64 and value.dim() for value in (*reads, *writes)):
            self.find("dtype", f"{name} in float64")
        used = [self.number(value, device) for value in reads], [self.number(value, device) for value in writes]
        for number in used[1]:
            self.memory[number].is_blank = False
        if self.capture is None:  # what is recorded runs when the graph is replayed
            self.use(stream, *used, kernels)
        shapes = tuple(tuple(value.shape) for value in reads)
        dtype = str((writes or reads)[0].dtype).removeprefix("torch.") if writes or reads else ""
        named = Operation(
            name, stream, self.thread.name, self.phase, *map(tuple, used), shapes, dtype, moved, flops, kernels
        )
        self.launches.append(named)
        if self.capture is not None:
            self.capture.launches.append(named)

    def use(self, stream: StreamId, reads: Iterable[int], writes: Iterable[int], kernels: int = 1) -> None:
        """One operation that uses these storages, judged against every use before it."""
        clock = self.clocks.setdefault(stream, {})
        merge(clock, self.thread.clock)
        self.counts[stream] += kernels
        self.users.setdefault(stream, set()).add(self.thread.name)
        self.thread.cards.add(stream[0])
        now = Use(stream, self.counts[stream], line_of_ours(sys._getframe(1)))
        self._operations += 1
        self.look(*self.watches.keys() & {*reads, *writes})
        for number in reads:
            self._ordered("reads", number, stream, self.memory[number].writes)
            self.memory[number].reads = [now, *(use for use in self.memory[number].reads if use[0] != stream)]
            self.memory[number].is_unread = False
        for number in writes:
            self._ordered("writes", number, stream, self.memory[number].writes + self.memory[number].reads)
            self.memory[number].writes = [now, *(use for use in self.memory[number].writes if use[0] != stream)]
            self.memory[number].is_unread, self.memory[number].written = True, self._operations
            for array, line in self.arrays.pop(number, ()):
                if array() is not None:
                    self.find("race", f"a GPU writes {self.memory[number]} of the host that an array of {line} shows")
        for number in (*reads, *writes):
            memory = self.memory[number]
            if memory.home not in (stream, (stream[0], GRAPH_POOL)) and memory.phase != LOAD and not memory.is_host:
                self._shared.add(number)

    def is_at_home(self, what: str, device: int) -> None:
        """A GPU is used, which has to be one of the run's."""
        if self.homes and device not in self.homes:
            self.find("wrong GPU", f"{what} on GPU {device}, the run has {', '.join(map(str, sorted(self.homes)))}")

    def _ordered(self, verb: str, number: int, stream: StreamId, uses: Iterable[Use]) -> None:
        for use in uses:
            if use.stream != stream and self.clocks[stream].get(use.stream, 0) < use.count:
                what = self.memory[number]
                waited = f"its last wait is {self.waited[stream]}" if stream in self.waited else "it never waited"
                told = f"stream {stream} {verb} {what} without waiting for stream {use.stream}, {use.line}; {waited}"
                self.find("race", told)

    # Memory -----------------------------------------------------------------------------------------------------------
    def number(self, value: Tensor, device: int) -> int:
        """The number of a tensor's storage; a new one is at home on the current stream, or in the pool of graphs."""
        storage = value.untyped_storage()
        number = storage._cdata  # the weak reference keeps this address from being given to another one
        if number not in self.memory:
            alive, is_host = StorageWeakRef(storage), number in self.pinned
            is_recorded = self.capture is not None and not is_host
            home = (device, GRAPH_POOL) if is_recorded else self.thread.stream(device)
            made = line_of_ours(sys._getframe(1), MADE)
            self.memory[number] = Memory(alive, home, storage.nbytes(), self.phase, is_host=is_host, made=made)
        return number

    def allocated(self, value: Tensor, device: int) -> None:
        """Memory of a GPU that nothing has written to."""
        if value.numel() and value.untyped_storage()._cdata not in self.memory:
            self.memory[self.number(value, device)].is_blank = True

    def check_written(self, name: str, values: Iterable[Tensor]) -> None:
        """What an operation reads of these tensors has to have been written."""
        for value in values:
            memory = self.memory.get(value.untyped_storage()._cdata)
            if memory and memory.is_blank:
                self.find("unwritten", f"{name} reads {memory}, which nothing has written, made at {memory.made}")

    def made(self, value: Tensor) -> str:
        """The line that made a tensor of a GPU or of the host, as far as it is known."""
        number = value.untyped_storage()._cdata
        if value.device.type == "cpu":
            return self._hosts[number][1] if number in self._hosts else "nowhere"
        return self.memory[number].made if number in self.memory else "nowhere"

    def made_on_host(self, value: Tensor) -> None:
        """Notes the line that made a tensor of the host."""
        storage = value.untyped_storage()
        if storage._cdata not in self._hosts:
            self._hosts[storage._cdata] = StorageWeakRef(storage), line_of_ours(sys._getframe(1), MADE)

    def pool(self, handle: Any, device: int) -> int:
        """The number of what the graphs of one pool share: each writes over what the others left there."""
        number = self._pools.setdefault(handle, -1 - len(self._pools))
        if number not in self.memory:
            self.memory[number] = Memory(None, (device, GRAPH_POOL), 0, LOAD, name="the memory of a pool of graphs")
        return number

    def records(self, handle: Any, stream: StreamId) -> None:
        """A graph of a pool is recorded on a stream: what one leaves there, PyTorch gives to that stream alone."""
        if self._recorders.setdefault(handle, stream) != stream:
            self.find("pool", "graphs of one pool share no memory, as they are recorded on several streams")

    def recorded(self, numbers: Iterable[int]) -> None:
        """A graph is about to be replayed that uses these: what lies outside of its pool has to be there still."""
        for number in numbers:
            memory = self.memory[number]
            if memory.home[1] != GRAPH_POOL and memory.alive.expired():
                what = f"a graph uses {memory} that were freed after it was recorded, made at {memory.made}"
                self.find("freed", what)

    def overwritten(self, numbers: Iterable[int]) -> None:
        """A graph is about to be replayed that writes these: its outputs, as far as they are still held."""
        for number in numbers:
            memory = self.memory[number]
            if memory.is_unread and not memory.alive.expired():
                self.find("overwritten", f"{memory} that a graph answered with, before anything has read them")

    def seen(self, values: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
        """Inputs of a graph are judged, each with the buffer that it is copied to where it is another than before."""
        for value, buffer in zip(values, buffers):
            source, copy = (self.memory.get(one.untyped_storage()._cdata) for one in (value, buffer))
            if source and copy and source.written > copy.written:
                lines = " and ".join(use.line for use in source.writes)
                self.find("stale", f"a graph does not see what {lines} wrote into an input after it was copied")

    def answered(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor], answers: Iterable[Tensor]) -> None:
        """A graph was called: its inputs are written, it is replayed, its outputs are copied, in this order."""

        def written(value: Tensor) -> int:
            memory = self.memory.get(value.untyped_storage()._cdata)
            return memory.written if memory else 0

        last = max(map(written, inputs), default=0)
        for output, answer in zip(outputs, answers):
            if written(output) < last:
                self.find("stale", "a graph is not replayed after its inputs were written")
            elif written(answer) < written(output):
                self.find("stale", "an output of a graph is read before the replay that writes it")

    def keep(self, value: Tensor, stream: StreamId) -> None:
        """record_stream: the allocator waits for what this stream was given so far."""
        self.memory[self.number(value, stream[0])].kept_for.add(stream)

    def sweep(self) -> None:
        """Judges the storages that were released: their bytes are their home stream's again, at once."""
        if self.is_ended:
            return
        for number in [number for number in self._shared if self.memory[number].alive.expired()]:
            memory = self.memory[number]
            known = merge(dict(self.clocks.get(memory.home, {})), self.thread.clock)
            for use in memory.reads + memory.writes:
                is_foreign = use.stream != memory.home and use.stream not in memory.kept_for
                if is_foreign and known.get(use.stream, 0) < use.count:
                    what = (
                        f"{memory.size:,} bytes of {memory.phase}, before stream {use.stream} has used them, {use.line}"
                    )
                    self.find("freed too early", what)
                    break
            self._shared.discard(number)

    # Findings ---------------------------------------------------------------------------------------------------------
    def raised(self, error: Exception) -> None:
        """What ended the run, at the line of ours that it came from."""
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        held = [one for frame, _ in frames[-DEEPEST:] for one in tensors_in(frame.f_locals.values())]
        if len(devices := sorted({str(one.device) for one in held})) > 1:
            lines = {name: sorted({self.made(one) for one in held if str(one.device) == name}) for name in devices}
            what += "".join(f"; on {name}, made at {', '.join(made)}" for name, made in lines.items())
        self.find("error", what, [one for frame, line in reversed(frames) for one in ours(frame, line)])
        self.is_ended = True

    def find(self, rule: str, what: str, frames: list[tuple[str, int, str]] | None = None) -> None:
        self.found[self.flaw(rule, what, frames)] += 1

    def flaw(self, rule: str, what: str, frames: list[tuple[str, int, str]] | None = None) -> Flaw:
        frames = (list(frames_of_ours(sys._getframe(1))) if frames is None else frames)[:DEEPEST]
        place = " < ".join(f"{name}:{line}" for name, line, _ in frames)
        name, line, _ = frames[0] if frames else ("", 0, "")
        function = next((function for _, _, function in frames if not function.startswith("<")), "")  # no list's own
        code = linecache.getline(str(ROOT / name), line).strip()
        return Flaw(rule, what, place, function, code, self.thread.work or self.thread.name, self.phase)


def merge(clock: Clock, other: Clock) -> Clock:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)
    return clock


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among local variables."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, Tensor) and value.dim():
            yield value


def line_of_ours(frame, deepest: int = 1) -> str:
    """FILE:LINE of the innermost frame of the product, and of those that called it."""
    frames = islice(frames_of_ours(frame), deepest)
    return " < ".join(f"{file}:{line}" for file, line, _ in frames) or "nowhere"


def frames_of_ours(frame) -> Iterator[tuple[str, int, str]]:
    """File, line and function of every frame of the product, innermost first."""
    while frame is not None:
        yield from ours(frame, frame.f_lineno)
        frame = frame.f_back


def ours(frame, line: int) -> Iterator[tuple[str, int, str]]:
    name = frame.f_code.co_filename
    if name.startswith(OURS):
        # a checkout may have the folder of the kernels as a link in that of the package
        name = name.removeprefix(f"{ROOT}/").replace("datasetdm_fast/kernels/", "kernels/")
        yield name, line, frame.f_code.co_name
