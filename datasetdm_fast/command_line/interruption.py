"""Ctrl-C and SIGTERM: work stops between batches, and a call that does not return is ended."""

import atexit
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import FrameType
from typing import Any, ClassVar, NoReturn, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)
HANDLING_SECONDS = 1.5  # in which the main thread must handle a signal: only it runs handlers, and only between calls
ENDING_SECONDS = 10.0  # from the handling of a signal to the end of the process
ENDED = "interrupted; run the same command again"
FINISHING = "\nfinishing this batch; once more ends at once\n"


@dataclass(eq=False)
class Interruption:
    """Within the block a command's first SIGINT or SIGTERM is noted, to finish the batch; the second ends it."""

    blocks: ClassVar[list["Interruption"]] = []  # of the main thread, the innermost last
    is_quiet: bool
    signal: int | None = None
    screen: int = 2  # file descriptor of messages

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            with suppress(OSError):
                self.screen = os.dup(2)  # libraries redirect 2 while they start
            self.blocks.append(self)
        return self

    def is_stopping(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """That of a command which has done its work, or was stopped."""
        return 0 if self.signal is None else 128 + self.signal

    def note(self, number: int) -> None:
        """Stores the first signal, and prints that the batch is finished."""
        if self.signal is None:
            self.signal = number
            if not self.is_quiet:
                _print(FINISHING, self.screen)

    def __exit__(self, *_: object) -> None:
        if self in self.blocks:
            self.blocks.remove(self)
        screen, self.screen = self.screen, 2
        if screen != 2:
            os.close(screen)


def end(number: int, is_quiet: bool = False, screen: int = 2) -> NoReturn:
    """Ends the process at once, as the signal would; a run folder is consistent at every moment."""
    if not is_quiet:
        _print(f"\n{ENDED}\n", screen)
    os._exit(128 + number)


def end_on_signals() -> None:
    """Makes signals end the process in one line until a command watches for them: imports take a second."""
    for number in STOPPING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda number, frame: end(number))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; Python would end a process by the signal itself once a KeyboardInterrupt went through an exec or eval."""


def _print(text: str, screen: int) -> None:
    with suppress(OSError):  # the reader has closed it
        os.write(screen, text.encode())


class SignalWatch:
    """Within the block a thread sees every SIGINT and SIGTERM arrive, and ends a process that does not react in time.

    Python runs handlers between two of its own instructions in the main thread: a convolution that lasts minutes, or
    the import of a large library, would delay them.
    """

    active: ClassVar["SignalWatch | None"] = None

    def __init__(self, is_last: bool):
        self.signal: int | None = None  # the one that ends the command
        self._is_last = is_last  # whether the process ends with the block
        self.is_open = self._is_handled = False  # open: a signal raises an exception, and is not only noted
        self._over = 0.0  # when the block ended, if the process ends with it
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if SignalWatch.active or threading.current_thread() is not threading.main_thread():
            return self
        SignalWatch.active = self
        is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        for number in STOPPING[1:] if is_ignored else STOPPING:  # a job in the background ignores Ctrl-C
            self._before[number] = signal.signal(number, self._handle)
        _silence_children()
        if self._is_last:
            # in Python's last steps Ctrl-C would replace a known exit code
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._woken_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def open(self) -> None:
        """From here on a signal raises an exception in the main thread."""
        self.is_open = True
        if self.signal is not None:
            self._raise(self.signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._is_handled = True
        if Interruption.blocks:
            Interruption.blocks[-1].note(number)
        else:
            self.signal = number
            if self.is_open:
                self._raise(number)

    @staticmethod
    def _raise(number: int) -> NoReturn:
        raise Interrupted if number == signal.SIGINT else SystemExit(128 + number)

    def _watch(self) -> None:
        first, begin = 0, 0.0
        while True:
            if select.select([self._reading], [], [], 0.05 if first else None)[0]:
                arrived = os.read(self._reading, 1)
                if not arrived:
                    os.close(self._reading)
                    return
                if getattr(signal.getsignal(arrived[0]), "__self__", None) is not self:
                    continue  # another signal, or a library has its own handler
                if first:
                    self._end(arrived[0])
                first, begin = arrived[0], time.monotonic()
            self._check(first, time.monotonic() - begin)

    def _check(self, number: int, seconds: float) -> None:
        """Ends a process that has not reacted to a signal for too many seconds."""
        if not self._is_handled and seconds > HANDLING_SECONDS:
            if Interruption.blocks and _is_on_gpu():
                Interruption.blocks[-1].note(number)
            else:  # one operation that would last many minutes
                self._end(number)
            return
        others = {thread for thread in threading.enumerate() if not thread.daemon} - {threading.main_thread()}
        is_waiting = self._over and seconds > HANDLING_SECONDS and others  # the process waits for these at its end
        if self.signal is not None and (seconds > ENDING_SECONDS or is_waiting):
            self._end(number)
        elif self._over and time.monotonic() - self._over > ENDING_SECONDS:
            self._end(number)

    def _end(self, number: int) -> NoReturn:
        block = Interruption.blocks[-1] if Interruption.blocks else None
        end(number, block.is_quiet if block else bool(self._over), block.screen if block else 2)

    def __exit__(self, *_: object) -> None:
        if SignalWatch.active is not self:
            return
        if self._is_last:  # the thread watches what runs at the end of the process, too
            self._over = time.monotonic()
            return
        SignalWatch.active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._writing)


def _is_on_gpu() -> bool:
    """Whether the main thread may be waiting for a batch that a GPU will finish in seconds."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return bool(cuda and getattr(cuda, "is_initialized", bool)())


@cache
def _silence_children() -> None:
    """Signals of forked processes are their own: they inherit the pipe, and the watch would take them for ours."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
