"""JSON objects larger than memory: the elements of their lists in turn, with the places to read them again."""

import mmap
import os
import re
import stat
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.untrusted import documents

LARGEST_STREAM = 4 * 2**30  # bytes; LVIS has 1.1 GB
WINDOW = 4 * 2**20  # bytes decoded at a time
LONGEST_ELEMENT = 64 * 2**20
_NOT_SPACE = re.compile(r"[^ \t\n\r]")


class Element(NamedTuple):
    key: str  # of the file's object
    value: Any
    start: int  # bytes
    end: int


class JsonStream:
    """A file with one JSON object, read as Latin-1 so that characters and bytes count alike, and decoded as needed."""

    def __init__(self, path: Path):
        self.path = path
        with storage.refusing(path):
            handle = storage.syscall("open", os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                facts = os.fstat(handle)
                if not stat.S_ISREG(facts.st_mode) or not 0 < facts.st_size <= LARGEST_STREAM:
                    raise Refused(
                        f"{path}: {facts.st_size} bytes, expected a file of at most {LARGEST_STREAM}",
                        "Give the annotation file as it was published.",
                    )
                self.data = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(handle)
        self.decoder = documents.JSON_DECODER
        self.keys: set[str] = set()  # of the part of the object that was read, those of empty lists included

    def __iter__(self) -> Iterator[Element]:
        """Every element of every list of the object, and every other value of it whole."""
        self.text, self.base, self.keys = "", 0, set()
        place = self._expect(self._space(3 if self.data[:3] == b"\xef\xbb\xbf" else 0), "{")
        while self._at(place := self._space(place)) != "}" or self.keys:
            key, place = self._value(place)
            if not isinstance(key, str) or key in self.keys:
                self._refuse(place, f"{documents.quote(key)} is no key, or occurs twice")
            self.keys.add(key)
            place = self._space(self._expect(self._space(place), ":"))
            if self._at(place) == "[":
                place = yield from self._list(key, place + 1)
            else:
                start = place
                value, place = self._value(place)
                yield Element(key, value, start, place)
            place = self._space(place)
            if self._at(place) == "}":
                break
            place = self._space(self._expect(place, ","))
        if self._space(place + 1) != len(self.data):
            self._refuse(place + 1, "more after the end of the object")

    def at(self, start: int, end: int) -> Any:
        """The value between two places that iteration gave."""
        return documents.parse_json(self.data[start:end], f"{self.path}: bytes {start} to {end}")

    def _list(self, key: str, place: int) -> Generator[Element, None, int]:
        place = self._space(place)
        if self._at(place) == "]":
            return place + 1
        while True:
            start = place
            value, place = self._value(place)
            yield Element(key, value, start, place)
            place = self._space(place)
            if self._at(place) == "]":
                return place + 1
            place = self._space(self._expect(place, ","))

    def _look(self, place: int, length: int) -> None:
        self.base = place
        self.text = self.data[place : place + length].decode("latin-1")

    def _at(self, place: int) -> str:
        if not 0 <= place - self.base < len(self.text):
            self._look(place, WINDOW)
        return self.text[place - self.base : place - self.base + 1]

    def _space(self, place: int) -> int:
        while self._at(place):
            if match := _NOT_SPACE.search(self.text, place - self.base):
                return self.base + match.start()
            place = self.base + len(self.text)
        return place

    def _expect(self, place: int, letter: str) -> int:
        if self._at(place) != letter:
            self._refuse(place, f"expected {letter}")
        return place + 1

    def _value(self, place: int) -> tuple[Any, int]:
        length = WINDOW
        self._at(place)
        while True:
            is_whole = self.base + len(self.text) >= len(self.data)
            try:
                value, end = self.decoder.raw_decode(self.text, place - self.base)
                if end < len(self.text) or is_whole:
                    break
                reason = "cut off"
            except (ValueError, RecursionError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
            if is_whole or length > LONGEST_ELEMENT:
                self._refuse(place, reason)
            length = length if self.base < place else length * 2
            self._look(place, length)
        piece = self.text[place - self.base : end]
        end += self.base
        return (value if piece.isascii() else self.at(place, end)), end

    def _refuse(self, place: int, reason: str) -> NoReturn:
        raise Refused(f"{self.path}: not readable as JSON (byte {place}: {reason[:160]})", documents.GET_AGAIN)
