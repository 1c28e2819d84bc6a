"""Scores of samples: what gives them from labels and image alone, how they are read, and conditions on them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
from PIL import Image

from datasetdm_fast.data import Annotation, Sample, Trust
from datasetdm_fast.engine.labels import Table, kind_of, mean_certainty
from datasetdm_fast.engine.labels.trust import NamedMap, named_map, pairs
from datasetdm_fast.errors import Refused, nearest, quote
from datasetdm_fast.runs.run_folder.ledger import Ledger
from datasetdm_fast.runs.run_folder.selections import Filter
from datasetdm_fast.untrusted import documents

if TYPE_CHECKING:
    from datasetdm_fast.runs.run_folder.shards import ShardLedger

LONGEST = 2000  # characters
DEEPEST = 20  # conditions inside conditions
SIGNS: dict[type[ast.cmpop], tuple[str, Callable]] = {
    ast.GtE: (">=", np.greater_equal),
    ast.LtE: ("<=", np.less_equal),
    ast.Eq: ("==", np.equal),
    ast.NotEq: ("!=", np.not_equal),
    ast.Gt: (">", np.greater),
    ast.Lt: ("<", np.less),
}
REMEDY = "Write, for example: score >= 0.6 and duplicate == 0. There are and, or, not and parentheses."
Values = Mapping[str, np.ndarray]  # score -> [N] float64, NaN where a sample has none


@dataclass(frozen=True)
class Condition:
    """A condition whose form has been checked."""

    node: ast.expr

    def passes(self, values: Values) -> np.ndarray:  # [N] bool
        """Which samples pass."""
        match self.node:
            case ast.BoolOp(op, parts):
                combine = np.all if isinstance(op, ast.And) else np.any
                return combine([Condition(part).passes(values) for part in parts], axis=0)
            case ast.UnaryOp(_, part):
                return ~Condition(part).passes(values)
            case ast.Compare(ast.Name(name), [sign], [number]):
                column = values[name]
                return SIGNS[type(sign)][1](column, ast.literal_eval(number)) & ~np.isnan(column)
        raise AssertionError("a condition that was not checked")

    def reason(self, values: Values, k: int) -> str:
        """Why sample k does not pass."""
        match self.node:
            case ast.BoolOp(_, parts):
                row = {name: column[k : k + 1] for name, column in values.items()}
                failed = [part for part in map(Condition, parts) if not part.passes(row)[0]]
                return "; ".join(part.reason(row, 0) for part in failed)
            case ast.UnaryOp(_, part):
                return f"{ast.unparse(part)} holds"
            case ast.Compare(ast.Name(name), [sign], [number]):
                value = values[name][k]
                state = f"{name} is {value:.4g}" if value == value else f"it has no {name}"
                return f"{state}, expected {SIGNS[type(sign)][0]} {ast.literal_eval(number):g}"
        raise AssertionError("a condition that was not checked")


def parse_where(text: str, known: Collection[str], flag: str = "--where") -> tuple[Condition, tuple[str, ...]]:
    """The condition that the text after `flag` states, and the scores it names; what is no condition is refused."""
    if len(text) > LONGEST:
        raise Refused(f"{flag}: {len(text)} characters, at most {LONGEST} are read", "Write a shorter condition.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that touch a word
            node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        place = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise Refused(f"{flag}: {documents.quote(text.strip())} is not a condition{place}", REMEDY) from error
    return Condition(node), tuple(dict.fromkeys(_find_scores(node, known, flag, DEEPEST)))


def _find_scores(node: ast.AST, known: Collection[str], flag: str, depth: int) -> Iterator[str]:
    """The scores that a condition compares; refuses everything but comparisons of a score with a number, and what joins
    them.
    """
    if not depth:
        raise Refused(f"{flag}: nested more than {DEEPEST} deep", "Write a simpler condition.")
    match node:
        case ast.BoolOp(_, parts):
            for part in parts:
                yield from _find_scores(part, known, flag, depth - 1)
        case ast.UnaryOp(ast.Not(), part):
            yield from _find_scores(part, known, flag, depth - 1)
        case ast.Compare(ast.Name(name), [sign], [number]) if type(sign) in SIGNS:
            if name not in known:
                raise Refused(
                    f"{flag}: {documents.quote(name)} is not a score{nearest(name, known)}",
                    f"It can use these scores: {', '.join(known)}.",
                )
            plain = number.operand if isinstance(number, ast.UnaryOp) else number
            is_signed = plain is number or isinstance(number.op, ast.USub | ast.UAdd)
            if not (isinstance(plain, ast.Constant) and type(plain.value) in (int, float) and is_signed):
                _refuse(number, flag, "a number")
            yield name
        case _:
            _refuse(node, flag, "a comparison of a score, such as score >= 0.6")


def _refuse(node: ast.AST, flag: str, expected: str) -> NoReturn:
    raise Refused(f"{flag}: {documents.quote(ast.unparse(node))} is not understood, expected {expected}", REMEDY)


HASH = "hash"  # a score that no condition can use
NEAR = 2  # bits by which the hashes of duplicates differ at most
BITS = 64  # of a hash
TILE = (64, 2048)  # hashes that are compared with so many others at once
SCORES = {  # name -> meaning
    "score": "mean confidence of the decoders in their labels, 0 to 1",
    "trust": "1 if the labels agree with the prompt and with one another, 0 if the sample is doubtful",
    "domain": "distance from the pictures that the decoders learned from; above 1 the sample is out of their domain",
    "agreement": "share of the pixels of things to which two kinds of labels give the same class, 0 to 1",
    "presence": "share of the classes named in the prompt that the labels show, 0 to 1",
    "sharpness": "variance of the Laplacian of the image's brightness (of 0 to 255)",
    "distance": f"bits of the image's {BITS}-bit hash that differ from the nearest earlier sample",
    "duplicate": f"1 if that distance is at most {NEAR}, else 0",
    "clip": "cosine similarity of image and prompt by the CLIP model of --clip",
}
ABSENT = {  # a score that no sample has -> what to do about it
    "domain": "Decoders that 0.2.0 trained, or fewer than 8 images, have no domain; train them again.",
    "agreement": "It needs two kinds of labels that name the same classes, such as semantic and instance.",
    "clip": "Add --clip DIR, the folder of a CLIP model, to compute it.",
}
LEAST_SHARE = 1 / 500  # of the pixels: a class that fills less of a map is not shown


@dataclass(frozen=True)
class Scored:
    """What is scored of a sample, stored or about to be."""

    image: np.ndarray  # [H, W, 3] uint8
    named: Sequence[str]  # classes of its prompt
    records: Mapping[str, Any]  # task -> what the ledger holds of its label
    label: Callable[[str], Annotation]
    tables: Mapping[str, Table]  # those of run.json
    trust: Trust

    @classmethod
    def of_sample(cls, sample: Sample, tables: Mapping[str, Table]) -> Self:
        labels = sample.annotations
        records = {task: kind_of(task).encode(label, labels, tables[task])[1] for task, label in labels.items()}
        trust = sample.trust or Trust()
        return cls(sample.image, sample.request.classes, records, labels.__getitem__, tables, trust)


def presence(made: Scored) -> float:
    """Of the classes a prompt names, the share that is shown by each kind of labels that can name them."""
    pixels = made.image.shape[0] * made.image.shape[1]
    shown = []
    for task, record in made.records.items():
        words = set(kind_of(task).words(record, made.tables[task], pixels * LEAST_SHARE))
        shown += [name in words for name in made.named if name in made.tables[task].get("classes", ())]
    return sum(shown) / len(shown) if shown else 1.0


def agreement(maps: list[NamedMap]) -> float | None:
    """The share of pixels with one name in both of two maps, of those named in either; None where none share a name."""
    same = named = count = 0
    for first, second in pairs(maps):
        count += 1
        named += int(np.count_nonzero(first | second))
        same += int(np.count_nonzero((first == second) & (first > 0)))
    return (same / named if named else 1.0) if count else None


def sharpness(image: Image.Image) -> float:
    grey = np.asarray(image.convert("L"), np.float32)
    inner = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).var())


SCORERS: dict[str, Callable[[Scored], float | None]] = {
    "score": lambda made: mean_certainty(made.records),
    "trust": lambda made: float(made.trust.is_trusted),
    "domain": lambda made: made.trust.domain,
    "agreement": lambda made: agreement([names for task in made.records if (names := named_map(made.label(task)))]),
    "presence": presence,
    "sharpness": lambda made: sharpness(Image.fromarray(made.image)),
}


@dataclass(frozen=True)
class ScoreTable:
    """The scores of all samples of a run."""

    indices: list[int]
    classes: list[tuple[str, ...]]  # words of each prompt
    values: dict[str, np.ndarray]  # score -> [N] float64, NaN where a sample has none


def read_scores(ledger: Ledger | ShardLedger, names: Sequence[str] = tuple(SCORES)) -> ScoreTable:
    """These scores of all samples of a run."""
    words = ledger.class_words()
    indices, classes = [index for index, _ in words], [named for _, named in words]
    place = {index: k for k, index in enumerate(indices)}
    values = {}
    for name in names:
        column = np.full(len(indices), np.nan)
        for index, value in ledger.scores("distance" if name == "duplicate" else name):
            if index in place and isinstance(value, (int, float)):
                column[place[index]] = value
        values[name] = np.where(np.isnan(column), column, column <= NEAR) if name == "duplicate" else column
    return ScoreTable(indices, classes, values)


def add_distances(ledger: Ledger | ShardLedger, changed: Collection[int] | None = ()) -> None:
    """Gives samples the distances that they lack, and renews those that the `changed` samples, which were dropped or
    restored, decide; None are all.
    """
    distances, shown = dict(ledger.scores("distance")), set(ledger.indices())
    changed = shown if changed is None else set(changed)
    known = shown | changed
    hashes = {index: value for index, value in ledger.scores(HASH) if value is not None and index in known}
    values, before = np.array([*hashes.values()], np.int64), np.full(len(hashes), -1)
    is_shown, is_changed = (np.array([index in each for index in hashes], bool) for each in (shown, changed))
    for place, index in enumerate(hashes):
        if (distance := distances.get(index)) is not None:
            before[place] = distance
    new, present = np.flatnonzero(is_shown & (is_changed | (before < 0))), np.flatnonzero(is_shown)
    others = np.setdiff1d(present, new)
    lost = nearest_bits(values, others, np.flatnonzero(~is_shown)) <= before[others]  # the nearest may be gone
    after = before.copy()
    after[others] = np.minimum(before[others], nearest_bits(values, others, new))
    outdated = np.union1d(new, others[lost])
    after[outdated] = nearest_bits(values, outdated, present)
    indices = [*hashes]
    if renewed := [(indices[k], "distance", int(after[k])) for k in np.flatnonzero(after != before)]:
        ledger.add_scores(renewed, replaces=True)


def nearest_bits(hashes: np.ndarray, places: np.ndarray, earlier: np.ndarray) -> np.ndarray:
    """Bits by which the hash [N] int64 at each of some places differs from the nearest of those before it among
    `earlier`; both are ascending.
    """
    nearest = np.full(len(places), BITS, np.uint8)
    for start in range(0, len(places), TILE[0]):
        rows = places[start : start + TILE[0], None]
        for left in range(0, int(np.searchsorted(earlier, rows[-1, 0])), TILE[1]):  # a tile stays in the caches
            columns = earlier[left : left + TILE[1]]
            bits = np.bitwise_count((hashes[rows] ^ hashes[columns]).view(np.uint64))
            if columns[-1] >= rows[0, 0]:
                bits[columns >= rows] = BITS
            part = nearest[start : start + TILE[0]]
            np.minimum(part, bits.min(1), out=part)
    return nearest


def absent(folder: Path, name: str) -> Refused:
    return Refused(f"--where: no sample of {folder} has the score {name}", ABSENT.get(name, "Leave it out."))


def passing(folder: Path, ledger: Ledger | ShardLedger, where: str) -> Filter:
    """Which samples of a run the condition keeps, and why not the others."""
    condition, names = parse_where(where, tuple(SCORES))
    if not ledger.score_names():
        raise Refused(
            f"--where: the samples of {folder} have no scores yet",
            f"Score them first: python -m datasetdm_fast.filter {quote(folder)}",
        )
    table = read_scores(ledger, names)
    for name in names:
        if np.isnan(table.values[name]).all():
            raise absent(folder, name)
    passes = condition.passes(table.values)
    return Filter(
        where,
        tuple(index for index, is_kept in zip(table.indices, passes, strict=True) if is_kept),
        {table.indices[k]: condition.reason(table.values, k) for k in np.flatnonzero(~passes).tolist()},
    )
