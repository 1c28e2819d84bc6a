"""JSON files of lists, written item by item to save memory."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasetdm_fast.runs.run_folder.ledger import canonical


def document(fields: Mapping[str, Any], **lists: Iterable[Any]) -> Iterator[bytes]:
    """An object of these fields, and of lists with an item a line."""
    yield b"{"
    for k, (name, value) in enumerate(fields.items()):
        yield f"{',' if k else ''}\n{canonical(name)}:{canonical(value)}".encode()
    for k, (name, items) in enumerate(lists.items()):
        yield f"{',' if k or fields else ''}\n{canonical(name)}:[".encode()
        for place, item in enumerate(items):
            yield f"{',' if place else ''}\n{canonical(item)}".encode()
        yield b"]"
    yield b"}\n"
