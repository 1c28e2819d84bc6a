"""Progress on a terminal as a bar, elsewhere as a line every ten seconds."""

from __future__ import annotations

import sys
import time

EVERY = 10.0  # seconds between two lines of progress


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, nothing when quiet; it counts UNet calls, or images where nobody reports the calls."""

    def __init__(self, images: int, is_quiet: bool, batch: int = 1, calls: int = 0):
        self._images, self._batch, self._calls = images, batch, calls
        self._made = self._stepped = 0
        self._is_quiet, self._bar = is_quiet, None
        self._begin = self._told = time.monotonic()
        if not is_quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="call" if calls else "image", desc=self._title, file=sys.stderr)

    @property
    def _total(self) -> int:
        return -(-self._images // self._batch) * (self._calls or 1)

    @property
    def _title(self) -> str:
        return f"{self._made}/{self._images} images"

    def stepped(self, count: int = 1) -> None:
        self._stepped += count
        now = time.monotonic()
        if self._bar:
            self._bar.update(count)
        elif not self._is_quiet and now - self._told >= EVERY:
            self._told = now
            left = (now - self._begin) / self._stepped * max(self._total - self._stepped, 0)
            print(f"{self._title}, {self._stepped / max(self._total, 1):.0%}, about {duration(left)} left", file=sys.stderr, flush=True)

    def made(self, count: int) -> None:
        self._made += count
        if self._bar:
            self._bar.set_description(self._title)
        if not self._calls:
            self.stepped(count)

    def tell(self, line: str) -> None:
        """A line for the screen, above the bar."""
        if self._bar:
            self._bar.write(line, file=sys.stderr)
        elif not self._is_quiet:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
