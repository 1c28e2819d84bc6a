"""The commit point: a sample exists when its row is committed here, after its files were published."""

import hashlib
import json
import threading
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasetdm_fast.data import Request, Trust
from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.untrusted import documents

TEXTS = {  # where a row's recipe holds texts of its request
    "negative_prompt": "negative",
    "class_prompt": "class_prompt",
}
DIGEST = "recipe"  # where a row holds the digest of a recipe that is stored once
DONE, QUARANTINED, DOUBTFUL = "done", "set-aside", "doubtful"
_SCHEMA = """
PRAGMA page_size = 16384;
CREATE TABLE IF NOT EXISTS samples (
    "index" INTEGER PRIMARY KEY, prompt TEXT NOT NULL, seed INTEGER NOT NULL, classes TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('done', 'set-aside', 'doubtful')), reason TEXT NOT NULL,
    recipe TEXT NOT NULL, files TEXT NOT NULL, labels TEXT NOT NULL, trust TEXT
);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS recipes (digest TEXT PRIMARY KEY, recipe TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tracings ("index" INTEGER PRIMARY KEY, tracings TEXT NOT NULL);
"""
NEEDED = {("table", "samples"), ("table", "notes")}
ADDED = {("table", "recipes"), ("table", "tracings")}  # which ledgers of format 1 have not, and do not get
SHARED_BYTES = 64  # from which on a recipe is stored once, and its rows name it by its digest
BLOCK = 32  # rows read at once
KEPT_RECIPES = 64  # in memory, as they were read
PARTS = ("files", "labels", "trust")  # of a row, each parsed only where it is asked for
# made when the first score is added
_SCORES = """
CREATE TABLE IF NOT EXISTS scores (
    "index" INTEGER NOT NULL, name TEXT NOT NULL, value, PRIMARY KEY (name, "index")
) WITHOUT ROWID
"""
# made when the first sample is dropped: its row leaves the table of samples for this one, and comes back unchanged
_DROPPED = """
CREATE TABLE IF NOT EXISTS dropped (
    "index" INTEGER PRIMARY KEY, prompt TEXT NOT NULL, seed INTEGER NOT NULL, classes TEXT NOT NULL,
    status TEXT NOT NULL, reason TEXT NOT NULL, recipe TEXT NOT NULL, files TEXT NOT NULL, labels TEXT NOT NULL,
    trust TEXT
)
"""
# in its place, where it is there already, as the bytes of the file tell the order of the notes
_NOTE = "INSERT INTO notes VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
_FORM = {"prompt": str, "seed": int, "reason": str, "recipe": dict, "files": dict, "labels": dict, "trust": dict}
_FORM |= {"tracings": dict}
_TRUST_FORM = {"missing": [str], "unnamed": [str], "disagreeing": float, "reasons": [str]}
_NOTHING = {"missing": (), "unnamed": (), "reasons": ()}  # what rows leave out of a trust
HEX_DIGITS = 64  # of a SHA-256 in rows of earlier versions
FOLDERS = {"image": "images"}  # of roles that have another name than their folder
LARGEST_TRACINGS = 2**24  # bytes
_COLUMNS = '"index", prompt, seed, classes, status, reason, recipe, files, labels, trust'
_IS_DOUBTFUL = "json_array_length(trust, '$.reasons') > 0"
_ENCODE = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_DECODE = json.JSONDecoder().decode


@dataclass(frozen=True)
class Row:
    """Everything known of one sample: enough to make it again alone, and to rebuild every index file."""

    request: Request
    recipe: dict[str, Any]  # how it was made: sampler, steps, guidance, size, batch shape, digests
    files: dict[str, tuple[str, StoredFile]] = field(
        default_factory=dict
    )  # role -> path inside the run folder, what was written
    labels: dict[str, Any] = field(default_factory=dict)  # task -> records and figures
    status: str = DONE
    reason: str = ""
    trust: Trust | None = None  # None where nothing has judged its labels
    tracings: dict[str, Any] = field(default_factory=dict)  # layer of the gallery -> what was traced for it

    @property
    def group(self) -> str:
        """What a sample and everything that is made of its image have in common."""
        return self.recipe.get("group") or self.files["image"][1].sha256[:16]


def canonical(value: Any) -> str:
    """JSON with one spelling for one value."""
    return documents.encodable(_ENCODE(value))


def digest_of(recipe: str) -> str:
    """The name that the rows of a ledger give a recipe: 128 bits of its SHA-256."""
    return hashlib.sha256(recipe.encode()).hexdigest()[:32]


class Ledger(AbstractContextManager):
    def __init__(self, path: Path, *, read_only: bool = False, journal: str = sqlite.WRITE_AHEAD):
        self.path, self._journal = path, journal
        self._lock = threading.Lock()  # of the thread that commits, while others ask for what is there
        self._recipes: dict[str, dict[str, Any]] = {}  # by digest, as they were read
        if read_only:
            self._connection = sqlite.connect_to_read(path)
        else:
            self._connection = sqlite.connect(path, _SCHEMA, journal)
        try:
            self._check_schema()
        except BaseException:
            self._connection.close()
            raise

    def _check_schema(self) -> None:
        """Refuses what a stranger may have put beside or in place of the tables: a view can take for ever."""
        found = self._connection.execute(
            "SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL LIMIT 9"
        ).fetchall()
        self._is_compact = ADDED <= set(found)
        self._columns = _COLUMNS if self._is_compact else _COLUMNS.removesuffix(", trust")
        known = NEEDED | ADDED | {("table", "scores"), ("table", "dropped")}
        faults = [f"no such table: {name}" for _, name in sorted(NEEDED - set(found))]
        faults += [f"it holds a {kind} {documents.quoted(name)}" for kind, name in found if (kind, name) not in known]
        if faults:
            raise Refused(
                f"{self.path}: not a readable ledger ({faults[0]})",
                "Restore the file from a copy, or choose another --out.",
            )

    def commit(self, rows: Iterable[Row]) -> None:
        """All rows or none; returns once they would survive a loss of power."""
        rows = list(rows)
        recipes = [canonical(row.recipe) for row in rows]
        shared = {digest_of(recipe): recipe for recipe in recipes if self._shares(recipe)}
        values = [
            (
                row.request.index,
                row.request.prompt,
                row.request.seed,
                canonical(row.request.classes),
                row.status,
                row.reason,
                self._recipe_of(row, recipe),
                canonical({role: self._written(row.request.id, role, *file) for role, file in row.files.items()}),
                canonical(row.labels),
                *([_written_trust(row.trust)] if self._is_compact else []),
            )
            for row, recipe in zip(rows, recipes, strict=True)
        ]
        tracings = [(row.request.index, _packed(row.tracings)) for row in rows if row.tracings]
        with self._writing():
            self._connection.executemany(
                f"INSERT OR REPLACE INTO samples ({self._columns}) "
                f"VALUES ({','.join('?' * len(self._columns.split(',')))})",
                values,
            )
            if self._is_compact:
                self._connection.executemany("INSERT OR IGNORE INTO recipes VALUES (?, ?)", shared.items())
                self._connection.executemany("INSERT OR REPLACE INTO tracings VALUES (?, ?)", tracings)
            self._connection.execute("DELETE FROM notes WHERE name = 'indexed'")

    def _shares(self, recipe: str) -> bool:
        return self._is_compact and len(recipe) >= SHARED_BYTES

    def _recipe_of(self, row: Row, recipe: str) -> str:
        """What a row holds of its recipe, all of it or its digest, beside what is the sample's own."""
        own = {name: text for name, field in TEXTS.items() if (text := getattr(row.request, field))}
        return canonical({**({DIGEST: digest_of(recipe)} if self._shares(recipe) else row.recipe), **own})

    def _written(self, id: str, role: str, path: str, stored: StoredFile) -> list[Any] | dict[str, Any]:
        """What a row holds of a file; its path where that is not the usual one of its role."""
        if self._is_compact:
            return [_short(stored.sha256), stored.size, *([path] if path != usual_path(role, id) else [])]
        return {"path": path, "sha256": stored.sha256, "bytes": stored.size}

    def add_scores(self, scores: Iterable[tuple[int, str, float | int | None]], *, replaces: bool = False) -> None:
        """Scores of samples: index, name and value; one that is there already stays as it is, unless it is replaced."""
        with self._writing():
            self._connection.execute(_SCORES)
            self._connection.executemany(
                f"INSERT OR {'REPLACE' if replaces else 'IGNORE'} INTO scores VALUES (?, ?, ?)", scores
            )
            self._connection.execute("DELETE FROM notes WHERE name = 'indexed'")  # the gallery shows them

    def forget_scores(self, name: str, why: tuple[str, str]) -> None:
        """Takes a score away from all samples, with a note of why that makes a repetition needless."""
        with self._writing():
            self._connection.execute(_SCORES)
            self._connection.execute("DELETE FROM scores WHERE name = ?", (name,))
            self._connection.execute(_NOTE, why)

    def scores(self, name: str) -> list[tuple[int, float | int | None]]:
        """Index and value of every sample that was given this score, by index."""
        if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'scores'").fetchone():
            return []
        statement = 'SELECT "index", value FROM scores WHERE name = ? ORDER BY "index"'
        return self._connection.execute(statement, (name,)).fetchall()

    def score_names(self) -> list[str]:
        """The names of the scores that any sample was given."""
        if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'scores'").fetchone():
            return []
        return [name for (name,) in self._connection.execute("SELECT DISTINCT name FROM scores ORDER BY name")]

    def drop(self, indices: Iterable[int]) -> None:
        """Takes samples of the data set out of it; their rows are kept."""
        self._move(indices, "samples", "dropped", _DROPPED)

    def restore(self, indices: Iterable[int]) -> None:
        """Brings dropped samples back into the data set."""
        self._move(indices, "dropped", "samples", "")

    def _move(self, indices: Iterable[int], source: str, target: str, schema: str) -> None:
        moved = [(index,) for index in indices]
        with self._writing():
            if schema:
                self._connection.execute(schema)
            self._connection.executemany(
                f'INSERT INTO {target} ({self._columns}) SELECT {self._columns} FROM {source} WHERE "index" = ?', moved
            )
            self._connection.executemany(f'DELETE FROM {source} WHERE "index" = ?', moved)
            self._connection.execute("DELETE FROM notes WHERE name = 'indexed'")

    def dropped(self) -> list[Row]:
        """The rows of the samples that were dropped, by index."""
        if not self._has_dropped():
            return []
        with self._lock:
            found = self._connection.execute(f'SELECT {self._columns} FROM dropped ORDER BY "index"').fetchall()
        return [self._row(*values) for values in found]

    def count_dropped(self) -> int:
        with self._lock:
            return self._connection.execute("SELECT count(*) FROM dropped").fetchone()[0] if self._has_dropped() else 0

    def _has_dropped(self) -> bool:
        return bool(self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'dropped'").fetchone())

    def class_words(self) -> list[tuple[int, tuple[str, ...]]]:
        """Index of every sample and the class words of its prompt, by index."""
        statement = 'SELECT "index", classes FROM samples WHERE status = ? ORDER BY "index"'
        return [(index, tuple(json.loads(text))) for index, text in self._connection.execute(statement, (DONE,))]

    def note(self, name: str, value: str) -> None:
        with self._writing():
            self._connection.execute(_NOTE, (name, value))

    def noted(self, name: str) -> str | None:
        found = self._connection.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return found and found[0]

    def damage(self) -> list[str]:
        """What SQLite finds wrong with the file."""
        return [line for (line,) in self._connection.execute("PRAGMA integrity_check(10)") if line != "ok"]

    def settle(self) -> bool:
        """Moves every commit into the file, whose bytes then depend on the rows alone; False while it is read."""
        if self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            return False
        part = sqlite.compact(self._connection, self.path)
        self._connection.close()
        storage.move(part, self.path)
        self._connection = sqlite.connect(self.path, _SCHEMA, self._journal)
        return True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:  # a full disk has already rolled it back
                    with suppress(Missing):  # what went wrong first is what is told; closing rolls back as well
                        self._connection.execute("ROLLBACK")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Within the block a ledger that is open for reading shows the same rows, whatever others commit."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("END")

    def indices(self, *statuses: str) -> list[int]:
        """The indices of the samples of these statuses, or of the data set."""
        where = f"status IN ({', '.join('?' * len(statuses or (DONE,)))})"
        statement = f'SELECT "index" FROM samples WHERE {where} ORDER BY "index"'
        return [index for (index,) in self._connection.execute(statement, statuses or (DONE,))]

    def within(self, first: int, stop: int) -> set[int]:
        """The indices from `first` to before `stop` that have a row, whatever became of them."""
        with self._lock:
            return {
                index
                for table in ("samples", *(["dropped"] if self._has_dropped() else []))
                for (index,) in self._connection.execute(
                    f'SELECT "index" FROM {table} WHERE "index" >= ? AND "index" < ?', (first, stop)
                )
            }

    def rows_within(self, first: int, stop: int, *statuses: str) -> list[Row]:
        """The rows of these statuses from the index `first` to before `stop`, with their files alone."""
        columns = self._only(("files",))
        where = f'"index" >= ? AND "index" < ? AND status IN ({", ".join("?" * len(statuses))})'
        statement = f'SELECT {columns} FROM samples WHERE {where} ORDER BY "index"'
        with self._lock:
            found = self._connection.execute(statement, (first, stop, *statuses)).fetchall()
            return [self._row(*values) for values in found]

    def count(self, status: str = DONE) -> int:
        with self._lock:
            found = self._connection.execute("SELECT count(*) FROM samples WHERE status = ?", (status,))
            return found.fetchone()[0]

    def quarantined(self) -> dict[str, list[int]]:
        """Reason -> the indices of the samples that were quarantined for it, in the order of the first of each."""
        statement = 'SELECT "index", reason FROM samples WHERE status = ? ORDER BY "index"'
        found: dict[str, list[int]] = {}
        with self._lock:
            for index, reason in self._connection.execute(statement, (QUARANTINED,)):
                found.setdefault(reason, []).append(index)
        return found

    def tally(self, number: int, classes: int) -> tuple[list[int], list[int]]:
        """Samples of each class that have a row, and those of them that were set aside, where every `number` indices
        belong to the next class.
        """
        there, aside = [0] * classes, [0] * classes
        for table in ("samples", *(["dropped"] if self._has_dropped() else [])):
            statement = f'SELECT "index" / ? % ?, status, count(*) FROM {table} GROUP BY 1, 2'
            with self._lock:
                found = self._connection.execute(statement, (number, classes)).fetchall()
            for kind, status, count in found:
                there[kind] += count
                aside[kind] += count if status == DOUBTFUL else 0
        return there, aside

    def last_record(self, label: str) -> int:
        """The largest id of the records of a label of the data set, or how many there are where that is more."""
        statement = (
            "SELECT max(count(*), coalesce(max(json_extract(record.value, '$.id')), 0)) "
            "FROM samples, json_each(samples.labels, ?) AS record WHERE status = ?"
        )
        return self._connection.execute(statement, (f'$."{label}"', DONE)).fetchone()[0]

    def count_doubtful(self) -> int:
        """Samples that are doubtful, whether or not they were set aside."""
        if not self._is_compact:
            return 0
        return self._connection.execute(f"SELECT count(*) FROM samples WHERE {_IS_DOUBTFUL}").fetchone()[0]

    def row(self, index: int) -> Row | None:
        found = self._connection.execute(f'SELECT {self._columns} FROM samples WHERE "index" = ?', (index,)).fetchone()
        return None if found is None else self._row(*found)

    def rows(self, *statuses: str, parts: Sequence[str] = PARTS) -> Iterator[Row]:
        """Rows of these statuses, or of the data set, by index, read as they are asked for; of PARTS and `tracings`
        only these, the others are empty.
        """
        wanted, columns, source = statuses or (DONE,), self._only(parts), "samples"
        if "tracings" in parts and self._is_compact:
            columns, source = f"{columns}, tracings", 'samples LEFT JOIN tracings USING ("index")'
        where = f"status IN ({', '.join('?' * len(wanted))})"
        found = self._connection.execute(f'SELECT {columns} FROM {source} WHERE {where} ORDER BY "index"', wanted)
        while block := found.fetchmany(BLOCK):
            if self.is_outdated():
                raise Missing(
                    f"{self.path}: another process changed it while it was read", "Run the same command again."
                )
            for values in block:
                yield self._row(*values)

    def is_outdated(self) -> bool:
        """Whether a finished ledger that is open for reading has changed since: it is to be opened again."""
        return self._connection.is_outdated()

    def _only(self, parts: Sequence[str]) -> str:
        """The columns, of PARTS only these and NULL for the others."""
        names = self._columns.split(", ")
        return ", ".join("NULL" if name in PARTS and name not in parts else name for name in names)

    def _row(self, index: int, *values: Any) -> Row:
        try:
            prompt, seed, classes, status, reason, recipe, *texts = values
            texts = (_unpacked(text) if isinstance(text, bytes) else text for text in texts)
            parts = [self._recipe(_DECODE(recipe)), *({} if text is None else _DECODE(text) for text in texts)]
            found = dict(zip(_FORM, (prompt, seed, reason, *parts)))
            if list(map(type, found.values())) != list(_FORM.values())[: len(found)]:
                documents.check_form(found, _FORM)
            recipe = found["recipe"]
            own = {field: recipe.pop(name) for name, field in TEXTS.items() if name in recipe}
            documents.check_form(own, dict.fromkeys(own, str))
            words = tuple(_DECODE(classes))
            if any(type(word) is not str for word in words):
                documents.check_form(list(words), [str], "classes")
            request = Request(index, prompt, seed, words, **own)
            stored = {role: _stored(request.id, role, file) for role, file in found["files"].items()}
            trust, traced = _trust(found.get("trust")), found.get("tracings", {})
            return Row(request, recipe, stored, found["labels"], status, reason, trust, traced)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error) as error:
            raise Refused(
                f"{self.path}: the row of sample {index!r} is damaged ({type(error).__name__}: {error})",
                "Restore the file from a copy, or choose another --out.",
            ) from error

    def _recipe(self, held: dict[str, Any]) -> dict[str, Any]:
        """The recipe, from what a row holds of it."""
        if not self._is_compact or DIGEST not in held:
            return held
        digest = held.pop(DIGEST)
        if digest not in self._recipes:
            found = self._connection.execute("SELECT recipe FROM recipes WHERE digest = ?", (digest,)).fetchone()
            if found is None or digest_of(found[0]) != digest:
                raise ValueError(f"no recipe has the digest {documents.quoted(digest)}")
            if len(self._recipes) == KEPT_RECIPES:
                self._recipes.clear()
            self._recipes[digest] = _DECODE(found[0])
        return {**self._recipes[digest], **held}

    def close(self) -> None:
        self._connection.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _written_trust(trust: Trust | None) -> str | None:
    """What a row holds of a trust: not what there is none of."""
    if trust is None:
        return None
    return canonical({name: part for name, part in asdict(trust).items() if name not in _NOTHING or part})


def _trust(value: Any) -> Trust | None:
    if not value:
        return None
    value = {**{name: list(part) for name, part in _NOTHING.items()}, **value}
    documents.check_form(value, _TRUST_FORM)
    documents.check_form(value.get("confidence") or 0.0, float)
    return Trust(**{name: tuple(part) if isinstance(part, list) else part for name, part in value.items()})


def _short(sha256: str) -> str:
    """A digest in 43 letters of base 64 in place of 64 of base 16."""
    return urlsafe_b64encode(bytes.fromhex(sha256)).decode().rstrip("=")


def _long(digest: str) -> str:
    """The digest in base 16, from either form."""
    found = digest if len(digest) == HEX_DIGITS else urlsafe_b64decode(digest + "=").hex()
    if len(found) != HEX_DIGITS:
        raise ValueError(f"{documents.quoted(digest)} is no SHA-256")
    return found


def _packed(tracings: dict[str, Any]) -> bytes:
    """What the table of tracings holds of a row's: about half their bytes."""
    return zlib.compress(canonical(tracings).encode(), 9)


def _unpacked(packed: bytes) -> str:
    """The text of a row's tracings."""
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(packed, LARGEST_TRACINGS)
    if not unpacking.eof:
        raise ValueError(f"its tracings are cut, or hold more than {LARGEST_TRACINGS} bytes")
    return text.decode()


def usual_path(role: str, id: str) -> str:
    return f"{FOLDERS.get(role, role)}/{id}.png"


def _stored(id: str, role: str, file: Any) -> tuple[str, StoredFile]:
    """Path, and what was written, from what a row holds of a file."""
    if isinstance(file, list):
        sha256, size, *path = file
        return documents.check_inside(*path or [usual_path(role, id)]), StoredFile(_long(sha256), size)
    return documents.check_inside(file["path"]), StoredFile(file["sha256"], file["bytes"])
