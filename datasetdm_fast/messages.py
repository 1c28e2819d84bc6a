"""Counts, lists and durations as messages write them."""

from collections.abc import Sequence


def count_noun(count: int, noun: str, several: str = "") -> str:
    """A count and what is counted, in the singular for one; `several` is the plural where it does not end in s."""
    return f"{count} {noun if count == 1 else several or f'{noun}s'}"


def list_names(names: Sequence[str], most: int) -> str:
    """At most so many names of a list, and how many there are more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def format_duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
