"""Result rows as tables for a terminal and for Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Cell = Callable[[Row], str]
Cells = tuple[list[str], list[list[str]]]  # head, rows
RED, PLAIN = "\x1b[31m", "\x1b[0m"
MOST_SPREAD = 0.15  # of the median of a row's rounds, between its slowest and its fastest round but these two
MOST_OTHERS = 0.1  # of all cores that others may use meanwhile
NOTHING = ("", "–")
FEWEST_TRIMMED = 5  # rounds from which on one of each end is left aside: one burst of others may meet any row


def unsteady(row: Row) -> str:
    """Why the figures of a row of the race are not to be relied on; empty where they are."""
    if "attention" not in row or "seconds_per_image" not in row:
        return ""
    found, others = row["seconds_per_image"], row["attention"]["others"]
    rounds = sorted(found["rounds"])
    kept = rounds[1:-1] if len(rounds) >= FEWEST_TRIMMED else rounds
    width = (kept[-1] - kept[0]) / found["median"]
    why = [f"spread {width:.0%}"] if width > MOST_SPREAD else []
    why += [f"others used {others:.0%} of the cores"] if others > MOST_OTHERS else []
    return " and ".join(why).replace("%", " %")


@dataclass(frozen=True)
class Table:
    """What each column shows of a row, and which rows are shown."""

    columns: Mapping[str, Cell]  # head -> text of a row
    select: Callable[[Sequence[Row]], Iterable[Row]] = list  # the rows that are shown, with figures that compare rows
    reason_at: int = 1  # the column in which a failed or absent row says why
    title: str = ""  # where it is not the measurement's

    def cells(self, rows: Sequence[Row]) -> Cells:
        """Head and lines, without columns that say nothing of any row."""
        lines = [self._line(row) for row in self.select(rows)]
        telling = [k for k in range(len(self.columns)) if not lines or any(line[k] not in NOTHING for line in lines)]
        head = list(self.columns)
        return [head[k] for k in telling], [[line[k] for k in telling] for line in lines]

    def _line(self, row: Row) -> list[str]:
        if row.get("status", "ok") == "ok":
            return [cell(row) for cell in self.columns.values()]
        label = "FAILED" if row["status"] == "failed" else "not here"
        line = [cell(row) for cell in list(self.columns.values())[: self.reason_at]] + [f"{label}: {row['why']}"]
        return line + [""] * (len(self.columns) - len(line))


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A figure with so many significant digits, a dash where there is none."""
    if value is None:
        return "–"
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}{unit}"
    text = f"{value:.{digits}g}"
    return (f"{float(text):,.0f}" if "e" in text else text) + unit


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:z.0f} %".replace("-", "−")


def span(values: Row | None, scale: float = 1.0, unit: str = "") -> str:
    """Median, and least and most in brackets."""
    if not values:
        return "–"
    median, least, most = (number(values[name] * scale) for name in ("median", "least", "most"))
    return f"{median}{unit} ({least}–{most})"


def text(key: str) -> Cell:
    return lambda row: str(row.get(key, ""))


def count(key: str) -> Cell:
    return lambda row: f"{row[key]:,}"


def figure(key: str, scale: float = 1.0, unit: str = "", digits: int = 3) -> Cell:
    return lambda row: number(None if row.get(key) is None else scale * row[key], digits, unit)


def share(key: str) -> Cell:
    return lambda row: percent(row.get(key))


def spread_of(key: str, scale: float = 1.0, unit: str = "") -> Cell:
    return lambda row: span(row.get(key), scale, unit)


def memory(key: str = "peak_mib") -> Cell:
    return lambda row: f"{row[key]:,.0f} MiB" if key in row else "–"


WHO = {"method": text("peer"), "precision": text("dtype"), "batch": text("batch")}


def aligned(cells: Cells, is_coloured: bool = False) -> str:
    """Columns for a terminal; a failed row says why instead of its figures, in red where there are colours."""
    head, rows = cells
    whole = [row for row in rows if not any(cell.startswith(("FAILED", "not here")) for cell in row)]
    widths = [max(map(len, column)) for column in zip(head, *whole)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    return "\n".join(f"{RED}{line}{PLAIN}" if is_coloured and "FAILED: " in line else line for line in lines)


def markdown(cells: Cells) -> str:
    head, rows = cells
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]])
