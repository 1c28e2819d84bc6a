"""The commit point: a sample exists when its row is committed here, after its files were published."""

import hashlib
import json
import zlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasetdm_fast.data import Request, Trust
from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.disk.storage import StoredFile
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.document import refuse_shards
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
NEEDED = {("table", name) for name in ("samples", "notes", "recipes", "tracings")}
SHARED_BYTES = 64  # from which on a recipe is stored once, and its rows name it by its digest
BLOCK = 32  # rows read at once
CACHED_RECIPES = 64  # in memory, as they were read
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
_OUTDATE = "DELETE FROM notes WHERE name = 'indexed'"  # the index files no longer show the rows
# an existing one is changed in its place, as the bytes of the file depend on the order of the notes
_NOTE = "INSERT INTO notes VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
_FORM = {"prompt": str, "seed": int, "reason": str, "recipe": dict, "files": dict, "labels": dict, "trust": dict}
_FORM |= {"tracings": dict}
_TRUST_FORM = {"missing": [str], "unnamed": [str], "disagreeing": float, "reasons": [str]}
_NOTHING = {"missing": (), "unnamed": (), "domain": None, "reasons": ()}  # what rows leave out of a trust
HEX_DIGITS = 64  # of a SHA-256
FOLDERS = {"image": "images"}  # of roles that have another name than their folder
LARGEST_TRACINGS = 2**24  # bytes
Tally = list[tuple[int, int]]  # of each class: samples that have a row, and those of them that are doubtful
_COLUMNS = '"index", prompt, seed, classes, status, reason, recipe, files, labels, trust'
_ENCODE = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode
_DECODE = json.JSONDecoder().decode


class RowFile(NamedTuple):
    """A file of a sample, as it was written."""

    path: str  # inside the run folder
    stored: StoredFile


@dataclass(frozen=True)
class Row:
    """Everything known of one sample: enough to make it again alone, and to rebuild every index file."""

    request: Request
    recipe: dict[str, Any]  # how it was made: sampler, steps, guidance, size, batch shape, digests
    files: dict[str, RowFile] = field(default_factory=dict)  # by role
    labels: dict[str, Any] = field(default_factory=dict)  # task -> records and figures
    status: str = DONE
    reason: str = ""
    trust: Trust | None = None  # None where nothing has judged its labels
    tracings: dict[str, Any] = field(default_factory=dict)  # layer of the gallery -> what was traced for it

    @property
    def group(self) -> str:
        """What a sample and everything that is made of its image have in common."""
        return self.recipe.get("group") or self.files["image"].stored.sha256[:16]


def canonical(value: Any) -> str:
    """JSON with one spelling for one value."""
    return documents.encodable(_ENCODE(value))


def digest_of(recipe: str) -> str:
    """The name that the rows of a ledger give a recipe: 128 bits of its SHA-256."""
    return hashlib.sha256(recipe.encode()).hexdigest()[:32]


class Ledger(AbstractContextManager):
    """The rows of a run, in SQLite; threads may share it."""

    def __init__(self, path: Path, *, read_only: bool = False, journal: str = sqlite.WRITE_AHEAD):
        refuse_shards(path.parents[1])
        self.path, self._journal = path, journal
        self._recipes: dict[str, dict[str, Any]] = {}  # by digest, as they were read
        self._database = sqlite.connect_to_read(path) if read_only else sqlite.connect(path, _SCHEMA, journal)
        try:
            # What a stranger may have put beside or in place of the tables is refused: a view can take for ever.
            entries = self._database.execute("SELECT type, name FROM sqlite_master WHERE sql IS NOT NULL LIMIT 9")
            foreign = set(entries) - NEEDED - {("table", "scores"), ("table", "dropped")}
            faults = [f"no such table: {name}" for _, name in sorted(NEEDED - set(entries))]
            faults += [f"it holds a {kind} {documents.quote(name)}" for kind, name in sorted(foreign, key=repr)]
            if faults:
                raise Refused(f"{self.path}: not a readable ledger ({faults[0]})", sqlite.RESTORE)
        except BaseException:
            self._database.close()
            raise

    def commit(self, rows: Iterable[Row]) -> None:
        """Adds all rows or none, and returns once they would survive a loss of power."""
        rows, values, shared = list(rows), [], {}
        for row in rows:
            request, recipe, stored = row.request, canonical(row.recipe), row.recipe
            if len(recipe) >= SHARED_BYTES:
                stored = {DIGEST: digest_of(recipe)}
                shared[stored[DIGEST]] = recipe
            texts = {name: text for name, field in TEXTS.items() if (text := getattr(request, field))}
            files: dict[str, list[Any]] = {}  # digest in base 64, size, and a path other than the usual one of a role
            for role, (path, file) in row.files.items():
                digest = urlsafe_b64encode(bytes.fromhex(file.sha256)).decode().rstrip("=")
                files[role] = [digest, file.size, *([path] if path != usual_path(role, request.id) else [])]
            values.append(
                (
                    request.index,
                    request.prompt,
                    request.seed,
                    canonical(request.classes),
                    row.status,
                    row.reason,
                    canonical({**stored, **texts}),
                    canonical(files),
                    canonical(row.labels),
                    encode_trust(row.trust),
                )
            )
        tracings = [
            (row.request.index, zlib.compress(canonical(row.tracings).encode(), 9)) for row in rows if row.tracings
        ]
        places = ",".join("?" * len(_COLUMNS.split(",")))
        with self._database.transaction():
            self._database.execute_many(f"INSERT OR REPLACE INTO samples ({_COLUMNS}) VALUES ({places})", values)
            self._database.execute_many("INSERT OR IGNORE INTO recipes VALUES (?, ?)", shared.items())
            self._database.execute_many("INSERT OR REPLACE INTO tracings VALUES (?, ?)", tracings)
            self._database.execute(_OUTDATE)

    def add_scores(self, scores: Iterable[tuple[int, str, float | int | None]], *, replaces: bool = False) -> None:
        """Adds scores of samples: index, name and value; an existing one stays, unless it `replaces` that."""
        with self._database.transaction():
            self._database.execute(_SCORES)
            self._database.execute_many(
                f"INSERT OR {'REPLACE' if replaces else 'IGNORE'} INTO scores VALUES (?, ?, ?)", scores
            )
            self._database.execute(_OUTDATE)  # the page shows them

    def forget_scores(self, name: str, why: tuple[str, str]) -> None:
        """Takes a score away from all samples, with a note of why that makes a repetition needless."""
        with self._database.transaction():
            self._database.execute(_SCORES)
            self._database.execute("DELETE FROM scores WHERE name = ?", (name,))
            self._database.execute(_NOTE, why)

    def scores(self, name: str) -> list[tuple[int, float | int | None]]:
        """Index and value of every sample that was given this score, by index."""
        if not self._has_table("scores"):
            return []
        return self._database.execute('SELECT "index", value FROM scores WHERE name = ? ORDER BY "index"', (name,))

    def score_names(self) -> list[str]:
        """The names of the scores that any sample was given."""
        if not self._has_table("scores"):
            return []
        return [name for (name,) in self._database.execute("SELECT DISTINCT name FROM scores ORDER BY name")]

    def _has_table(self, name: str) -> bool:
        return bool(self._database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)))

    def move(self, indices: Iterable[int], *, is_back: bool = False) -> None:
        """Takes samples out of the data set, whose rows are kept in another table, or brings them back."""
        source, target = ("dropped", "samples") if is_back else ("samples", "dropped")
        parameters = [(index,) for index in indices]
        with self._database.transaction():
            self._database.execute(_DROPPED)
            copy = f'INSERT INTO {target} ({_COLUMNS}) SELECT {_COLUMNS} FROM {source} WHERE "index" = ?'
            self._database.execute_many(copy, parameters)
            self._database.execute_many(f'DELETE FROM {source} WHERE "index" = ?', parameters)
            self._database.execute(_OUTDATE)

    def forget(self, indices: Iterable[int]) -> None:
        """Takes samples out of the run as if they had never been made."""
        parameters = [(index,) for index in indices]
        with self._database.transaction():
            for table in ("samples", "tracings"):
                self._database.execute_many(f'DELETE FROM {table} WHERE "index" = ?', parameters)
            self._database.execute(_OUTDATE)

    def dropped_rows(self) -> list[Row]:
        """The rows of the samples that were dropped, with their files alone, by index."""
        if not self._has_table("dropped"):
            return []
        rows = self._database.execute(f'SELECT {_columns(("files",))} FROM dropped ORDER BY "index"')
        return [self._decode_row(*values) for values in rows]

    def count_dropped(self) -> int:
        return self._database.execute("SELECT count(*) FROM dropped")[0][0] if self._has_table("dropped") else 0

    def _tables(self) -> list[str]:
        """The tables that have rows, whatever became of their samples."""
        return ["samples", "dropped"] if self._has_table("dropped") else ["samples"]

    def class_words(self) -> list[tuple[int, tuple[str, ...]]]:
        """Index of every sample and the class words of its prompt, by index."""
        rows = self._database.execute('SELECT "index", classes FROM samples WHERE status = ? ORDER BY "index"', (DONE,))
        return [(index, tuple(json.loads(text))) for index, text in rows]

    def note(self, name: str, value: str) -> None:
        with self._database.transaction():
            self._database.execute(_NOTE, (name, value))

    def read_note(self, name: str) -> str | None:
        rows = self._database.execute("SELECT value FROM notes WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def damage(self) -> list[str]:
        """What SQLite finds wrong with the file."""
        return [line for (line,) in self._database.execute("PRAGMA integrity_check(10)") if line != "ok"]

    def settle(self) -> bool:
        """Moves every commit into the file, whose bytes then depend on the rows alone; False while it is read."""
        if self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]:
            return False
        part = self._database.copy()
        self._database.close()
        storage.move(part, self.path)
        self._database = sqlite.connect(self.path, _SCHEMA, self._journal)
        return True

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Within the block a ledger that is open for reading shows the same rows, whatever others commit."""
        self._database.execute("BEGIN")
        try:
            yield
        finally:
            self._database.execute("END")

    def indices(self, *statuses: str) -> list[int]:
        """The indices of the samples of these statuses, or of the data set."""
        statuses = statuses or (DONE,)
        among = ", ".join("?" * len(statuses))
        statement = f'SELECT "index" FROM samples WHERE status IN ({among}) ORDER BY "index"'
        return [index for (index,) in self._database.execute(statement, statuses)]

    def indices_between(self, first: int, stop: int) -> set[int]:
        """The indices from `first` to before `stop` that have a row, whatever became of them."""
        where = '"index" >= ? AND "index" < ?'
        statements = [f'SELECT "index" FROM {table} WHERE {where}' for table in self._tables()]
        return {index for statement in statements for (index,) in self._database.execute(statement, (first, stop))}

    def count(self, status: str = DONE) -> int:
        return self._database.execute("SELECT count(*) FROM samples WHERE status = ?", (status,))[0][0]

    def quarantined_by_reason(self) -> dict[str, list[int]]:
        """Reason -> the indices of the samples that were quarantined for it, in the order of the first of each."""
        indices: dict[str, list[int]] = {}
        statement = 'SELECT "index", reason FROM samples WHERE status = ? ORDER BY "index"'
        for index, reason in self._database.execute(statement, (QUARANTINED,)):
            indices.setdefault(reason, []).append(index)
        return indices

    def tally(self, number: int, classes: int) -> Tally:
        """The tally of so many classes; sample k is of class k // number % classes."""
        tally = [(0, 0)] * classes
        for table in self._tables():
            statement = f'SELECT "index" / ? % ?, count(*), sum(status = ?) FROM {table} GROUP BY 1'
            for kind, *counts in self._database.execute(statement, (number, classes, DOUBTFUL)):
                made, doubtful = map(sum, zip(tally[kind], counts))
                tally[kind] = made, doubtful
        return tally

    def last_record(self, label: str) -> int:
        """The largest id of the records of a label of the data set, or their number where that is larger."""
        statement = (
            "SELECT max(count(*), coalesce(max(json_extract(record.value, '$.id')), 0)) "
            "FROM samples, json_each(samples.labels, ?) AS record WHERE status = ?"
        )
        return self._database.execute(statement, (f'$."{label}"', DONE))[0][0]

    def count_trust(self, stop: int | None = None) -> tuple[int, int, int]:
        """Samples before `stop`, in the data set or beside it, that are doubtful, that are out of the domain of their
        decoders, and whose distance from that was measured.
        """
        is_doubtful, domain = "json_array_length(trust, '$.reasons') > 0", "json_extract(trust, '$.domain')"
        statement = f"SELECT total({is_doubtful}), total({domain} > 1), count({domain}) FROM samples"
        among = ' WHERE ?1 IS NULL OR "index" < ?1'
        doubtful, outside, measured = map(int, self._database.execute(statement + among, (stop,))[0])
        return doubtful, outside, measured

    def row(self, index: int) -> Row | None:
        rows = self._database.execute(f'SELECT {_COLUMNS} FROM samples WHERE "index" = ?', (index,))
        return self._decode_row(*rows[0]) if rows else None

    def rows(self, *statuses: str, parts: Sequence[str] = PARTS) -> Iterator[Row]:
        """Rows of these statuses, or of the data set, by index; of PARTS and `tracings` only these are filled."""
        columns, source = _columns(parts), "samples"
        if "tracings" in parts:
            columns, source = f"{columns}, tracings", 'samples LEFT JOIN tracings USING ("index")'
        statuses = statuses or (DONE,)
        among = ", ".join("?" * len(statuses))
        statement = f'SELECT {columns} FROM {source} WHERE status IN ({among}) ORDER BY "index"'
        for block in self._database.read_blocks(statement, statuses, BLOCK):
            if self._database.is_outdated():
                raise Missing(
                    f"{self.path}: another process changed it while it was read", "Run the same command again."
                )
            for values in block:
                yield self._decode_row(*values)

    def is_outdated(self) -> bool:
        """Whether a finished ledger that is open for reading has changed since: it is to be opened again."""
        return self._database.is_outdated()

    def _decode_row(self, index: int, *values: Any) -> Row:
        try:
            prompt, seed, classes, status, reason, recipe, *texts = values
            texts = (_unpack(text) if isinstance(text, bytes) else text for text in texts)
            parts = [self._decode_recipe(_DECODE(recipe)), *({} if text is None else _DECODE(text) for text in texts)]
            fields = dict(zip(_FORM, (prompt, seed, reason, *parts)))
            if list(map(type, fields.values())) != list(_FORM.values())[: len(fields)]:
                documents.check_form(fields, _FORM)
            recipe = fields["recipe"]
            request_texts = {field: recipe.pop(name) for name, field in TEXTS.items() if name in recipe}
            documents.check_form(request_texts, dict.fromkeys(request_texts, str))
            words = tuple(_DECODE(classes))
            if any(type(word) is not str for word in words):
                documents.check_form(list(words), [str], "classes")
            request = Request(index, prompt, seed, words, **request_texts)
            files = {role: _decode_file(request.id, role, file) for role, file in fields["files"].items()}
            trust, tracings = decode_trust(fields.get("trust")), fields.get("tracings", {})
            return Row(request, recipe, files, fields["labels"], status, reason, trust, tracings)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error) as error:
            cause = f"the row of sample {index!r} is damaged ({type(error).__name__}: {error})"
            raise Refused(f"{self.path}: {cause}", sqlite.RESTORE) from error

    def _decode_recipe(self, value: dict[str, Any]) -> dict[str, Any]:
        """The recipe, from what a row holds of it."""
        if DIGEST not in value:
            return value
        digest = value.pop(DIGEST)
        if digest not in self._recipes:
            rows = self._database.execute("SELECT recipe FROM recipes WHERE digest = ?", (digest,))
            if not rows or digest_of(rows[0][0]) != digest:
                raise ValueError(f"no recipe has the digest {documents.quote(digest)}")
            if len(self._recipes) == CACHED_RECIPES:
                self._recipes.clear()
            self._recipes[digest] = _DECODE(rows[0][0])
        return {**self._recipes[digest], **value}

    def close(self) -> None:
        self._database.close()

    def __exit__(self, *_: object) -> None:
        self._database.close()


def _columns(parts: Sequence[str]) -> str:
    """The columns of a row, of PARTS only these."""
    return ", ".join("NULL" if name in PARTS and name not in parts else name for name in _COLUMNS.split(", "))


def encode_trust(trust: Trust | None) -> str | None:
    """What a row holds of a trust: not what there is none of."""
    if trust is None:
        return None
    parts = asdict(trust)
    return canonical({name: parts[name] for name in parts if name not in _NOTHING or parts[name] != _NOTHING[name]})


def decode_trust(value: Any) -> Trust | None:
    if not value:
        return None
    value = {**{name: part if part is None else list(part) for name, part in _NOTHING.items()}, **value}
    documents.check_form(value, _TRUST_FORM)
    for name in ("confidence", "domain"):
        documents.check_form(value.get(name) or 0.0, float)
    return Trust(**{name: tuple(part) if isinstance(part, list) else part for name, part in value.items()})


def _unpack(packed: bytes) -> str:
    """The text of a row's tracings."""
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(packed, LARGEST_TRACINGS)
    if not unpacking.eof:
        raise ValueError(f"its tracings are cut, or hold more than {LARGEST_TRACINGS} bytes")
    return text.decode()


def usual_path(role: str, id: str) -> str:
    return f"{FOLDERS.get(role, role)}/{id}.png"


def _decode_file(id: str, role: str, file: Any) -> RowFile:
    """The file of a row, from what the ledger holds of it."""
    digest, size, *names = file
    path, sha256 = documents.check_inside(*names or [usual_path(role, id)]), urlsafe_b64decode(digest + "=").hex()
    if len(sha256) != HEX_DIGITS:
        raise ValueError(f"{documents.quote(digest)} is no SHA-256")
    if type(size) is not int or size < 0:
        raise ValueError(f"{documents.quote(size)} is no size of a file")
    return RowFile(path, StoredFile(sha256, size))


@dataclass
class IndexFile:
    """The bytes of one file, some rows at a time and by id; one reading of the ledger serves all files."""

    document: Mapping[str, Any]
    ledger: Ledger

    def begin(self) -> Iterable[bytes]:
        """What stands before the first row."""
        return ()

    def add(self, rows: Sequence[Row]) -> Iterable[bytes]:
        """What stands there of these rows."""
        return ()

    def end(self) -> Iterable[bytes]:
        """What stands after the last row."""
        return ()
