"""Ctrl-C and SIGTERM: work looks at them between batches, and a call that does not return is ended."""

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from types import FrameType
from typing import Any, NoReturn, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 1.5  # seconds in which the main thread must hear a signal; only it runs handlers, and only between calls
TIDYING = 10.0  # seconds from a signal that was heard to the end of the process
ENDED = "interrupted; run the same command again"
FINISHING = "\nfinishing this batch; once more ends at once\n"


class Interruption:
    """Within the block the first SIGINT or SIGTERM is remembered, to finish the batch; the second ends the process."""

    def __init__(self, is_quiet: bool):
        self.signal: int | None = None
        self.is_quiet = is_quiet
        self._is_late = False  # whether the handler of a signal that `hear` was told of is still to run
        self.screen = 2
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            with suppress(OSError):
                self.screen = os.dup(2)  # which libraries point elsewhere while they start
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def is_stopping(self) -> bool:
        return self.signal is not None

    def exit_code(self, code: int) -> int:
        return code if self.signal is None else 128 + self.signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_late:
            self._is_late = False
        elif self.signal is None:
            self.hear(number)
        else:
            end(number, self.is_quiet, self.screen)

    def hear(self, number: int, is_handler_late: bool = False) -> None:
        """Remembers the first signal, and tells the user."""
        self.signal, self._is_late = number, is_handler_late
        if not self.is_quiet:
            _tell(FINISHING, self.screen)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        screen, self.screen = self.screen, 2
        if screen != 2:
            os.close(screen)


def end(number: int, is_quiet: bool = False, screen: int = 2) -> None:
    """Ends the process at once, as the signal would; what a run folder holds is whole at every moment."""
    if not is_quiet:
        _tell(f"\n{ENDED}\n", screen)
    os._exit(128 + number)


def end_quietly() -> None:
    """From here on a signal ends the process in one line, until a command watches for them: a second of imports."""
    for number in STOPPING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda number, frame: end(number))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; Python would end a process by the signal itself once a KeyboardInterrupt went through an exec or eval."""


def _tell(text: str, screen: int) -> None:
    with suppress(OSError):  # nobody reads it any more
        os.write(screen, text.encode())


class SignalWatch:
    """Within the block a thread sees every SIGINT and SIGTERM arrive, and ends a process that does not react in time.

    Python runs handlers between two of its own instructions in the main thread: a convolution that lasts minutes, or
    the import of a large library, would keep them waiting.
    """

    def __init__(self, is_last: bool):
        self.signal: int | None = None  # the one that ends the command
        self._is_last = is_last  # whether the process ends with the block
        self._told: int | None = None  # the last signal that work has finished a batch for
        self._closed = threading.Event()
        self._is_open = self._is_heard = self._is_over = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        is_inner = isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), (SignalWatch, Interruption))
        if is_inner or threading.current_thread() is not threading.main_thread():
            return self
        stays = {signal.SIGINT} if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else set()
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING if number not in stays}
        _silence_children()
        if self._is_last:
            atexit.register(_ignore_interrupts)
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._woken_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_heard:
            end(number)
        self._is_heard, self.signal = True, number
        if self._is_open:
            self._raise()

    def open(self) -> None:
        """From here on a signal raises an exception in the main thread; before, and after `shut`, it is only noted."""
        self._is_open = True
        if self._is_heard:
            self._raise()

    def shut(self) -> None:
        self._is_open = False

    def _raise(self) -> NoReturn:
        raise Interrupted if self.signal == signal.SIGINT else SystemExit(128 + self.signal)

    def _watch(self) -> None:
        told: Any = None  # the block that has had its first signal
        while arrived := os.read(self._reading, 1):
            number = arrived[0]
            owner = getattr(signal.getsignal(number), "__self__", None) if number in STOPPING else None
            if isinstance(owner, Interruption):
                if owner is told:
                    end(number, owner.is_quiet, owner.screen)
                told, self._told = owner, number
                self._wait_for_batch(number, owner)
            elif owner is self:
                self._wait_for_end(number)
        os.close(self._reading)

    def _wait_for_batch(self, number: int, owner: Interruption) -> None:
        if _is_reached(lambda: owner.signal is not None or self._closed.is_set()):
            return
        if not _is_on_gpu():  # one operation of a batch that would go on for many minutes
            end(number, owner.is_quiet, owner.screen)
        owner.hear(number, is_handler_late=True)

    def _wait_for_end(self, number: int) -> None:
        begin = time.monotonic()
        self.signal = number
        if not _is_reached(lambda: self._is_heard or self._closed.is_set()):
            end(number)
        while not self._closed.wait(0.05):
            seconds = time.monotonic() - begin
            if seconds > TIDYING or (seconds > PATIENCE and self._is_over and _are_others_at_work()):
                end(number, is_quiet=self._is_over)

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        # the code is known: a signal at the very end would make another one of it
        if self._is_last and self._told and not self.signal:
            for number in self._before:
                signal.signal(number, signal.SIG_IGN)
            limit = threading.Timer(TIDYING, os._exit, (128 + self._told,))
            limit.daemon = True
            limit.start()
            return
        if self._is_last:  # the thread watches what runs at the end of the process, too
            self._is_over = True
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._writing)
        self._closed.set()


def _ignore_interrupts() -> None:
    """Python's last steps, in which it runs no handlers any more: Ctrl-C would end a process whose exit code is known
    by the signal itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_reached(condition) -> bool:
    """Whether it became true within PATIENCE."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def _is_on_gpu() -> bool:
    """Whether the main thread may be waiting for a batch that a GPU will finish in seconds."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return bool(cuda and getattr(cuda, "is_initialized", bool)())


def _are_others_at_work() -> bool:
    """Whether threads that the process waits for at its end are still in a call."""
    return any(not one.daemon and one is not threading.main_thread() for one in threading.enumerate())


@cache
def _silence_children() -> None:
    """Signals of forked processes are their own: they inherit the pipe, and the watch would take them for ours."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
