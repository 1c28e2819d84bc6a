"""Ctrl-C and SIGTERM, turned into a flag that work looks at between batches."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self


class Interruption:
    """Within the block the first SIGINT or SIGTERM is remembered, to finish the batch; the second ends the process."""

    def __init__(self, is_quiet: bool):
        self.signal: int | None = None
        self._is_quiet = is_quiet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def is_stopping(self) -> bool:
        return self.signal is not None

    def exit_code(self, code: int) -> int:
        return code if self.signal is None else 128 + self.signal

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if not self._is_quiet:
            os.write(2, b"\nfinishing this batch; once more ends at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
