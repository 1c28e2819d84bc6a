"""Faults of one line planted into copies of this checkout, one at a time: `python tests/mutants.py [WORD]` runs the
tests of each (of those with the word in their path or code), prints a table, and ends with 1 where the tests notice
fewer than 95 of a hundred.

The faults are listed in planted.py by the code they replace, whatever its layout. A fault counts as noticed where a
test fails or does not end; one that keeps the tests from being collected says nothing, and counts as an error.
"""

from __future__ import annotations

import argparse
import ast
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import cache_from_source
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue

HERE = Path(__file__).parents[1]
LEAST_NOTICED = 0.95
LONGEST = 180  # seconds the tests of one fault may take; more than that is a loop without end
NOTICED, HANGS, MISSED, BROKEN = "noticed", "noticed, hangs", "MISSED", "NOT TESTED"
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)
LIBRARIES = ["torch", "scipy.ndimage", "safetensors.torch", "diffusers", "transformers", "pytest"]  # loaded once
# before these are loaded, which load Triton, too
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Mutant:
    """One fault: the code of a file that is replaced, by what, whom it would harm, and the tests that should notice."""

    file: str
    old: str
    new: str
    harm: str
    tests: str  # of pytest's command line, in the folder of tests


def tokens(code: str) -> list[tokenize.TokenInfo]:
    """The tokens of Python code or of a piece of it, without its layout and the commas that close a list."""
    found: list[tokenize.TokenInfo] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.ERRORTOKEN:
                return []
            if token.type not in LAYOUT:
                if token.string in (")", "]", "}") and found and found[-1].string == ",":
                    found.pop()
                found.append(token)
    except tokenize.TokenError as error:
        return found if "EOF in multi-line statement" in str(error) else []  # a piece may end within brackets
    return found


def planted(source: str, mutant: Mutant) -> str:
    """The source with the fault; a ValueError where its code is not there exactly once or the fault changes nothing."""
    begin, end = _place(source, mutant)
    changed = source[:begin] + mutant.new + source[end:]
    if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
        raise ValueError(f"{mutant.file}: {mutant.new!r} in place of {mutant.old!r} changes nothing")
    return changed


def _place(source: str, mutant: Mutant) -> tuple[int, int]:
    """Where the fault's code begins and ends in the source: as code of any layout, else letter by letter, as SQL is."""
    there, sought = tokens(source), [token.string for token in tokens(mutant.old)]
    words = [token.string for token in there]
    places = [k for k in range(len(words)) if sought and words[k : k + len(sought)] == sought]
    if len(places) == 1:
        lines = [0, *accumulate(map(len, source.splitlines(keepends=True)))]
        first, last = there[places[0]].start, there[places[0] + len(sought) - 1].end
        return lines[first[0] - 1] + first[1], lines[last[0] - 1] + last[1]
    count = len(places) or source.count(mutant.old)
    if places or count != 1:
        raise ValueError(f"{mutant.file}: {mutant.old!r} is there {count} times, expected once")
    begin = source.index(mutant.old)
    return begin, begin + len(mutant.old)


def copied(root: Path, target: Path) -> Path:
    """A copy of the Python files of a checkout and links to all others, importable as what is installed is."""

    def one(source: str, place: str) -> None:
        shutil.copy(source, place) if source.endswith(".py") else os.symlink(os.path.realpath(source), place)

    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(root, target, symlinks=True, ignore=left_out, copy_function=one)
    for name in ("kernels", "export"):  # of the checkout, but modules of the package
        if (target / name).is_dir() and not (target / "datasetdm_fast" / name).exists():
            (target / "datasetdm_fast" / name).symlink_to(target / name)
    return target


def run_tests(copy: Path, tests: Iterable[str], limit: float | None = None) -> int | None:
    """The exit code of pytest, run where libraries are loaded and no code of ours; None where it does not end."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LIBRARIES)
    process = server.Process(target=_run_pytest, args=(str(copy), list(tests)))
    process.start()
    process.join(limit or LONGEST)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def _run_pytest(copy: str, tests: list[str]) -> None:
    os.chdir(copy)
    log = os.open("pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(file, descriptor)
    os.environ["PYTHONPATH"] = copy
    sys.path.insert(0, copy)
    import pytest

    sys.exit(pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))


def outcome(copy: Path, mutant: Mutant) -> str:
    """What the tests say of a fault in a copy, which is whole again afterwards."""
    file = copy / mutant.file
    source = file.read_text()
    file.write_text(planted(source, mutant))
    try:
        code = run_tests(copy, [f"tests/{name}" for name in mutant.tests.split()])
    finally:
        file.write_text(source)
        Path(cache_from_source(str(file))).unlink(missing_ok=True)  # that of the same second and size counts as fresh
    return {0: MISSED, 1: NOTICED, None: HANGS}.get(code, BROKEN)


def outcomes(root: Path, mutants: list[Mutant], workers: int) -> Iterator[tuple[Mutant, str, float]]:
    """Every fault with what came of it and in how many seconds, in the order of the list."""
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for k in range(workers):
            copies.put(copied(root, Path(folder, f"copy{k}")))
        copy = copies.get()
        whole = sorted({f"tests/{name}" for mutant in mutants for name in mutant.tests.split()})
        if run_tests(copy, whole, len(whole) * LONGEST) != 0:
            raise SystemExit(f"The tests fail without any fault:\n{(copy / 'pytest.log').read_text()[-4000:]}")
        copies.put(copy)

        def one(mutant: Mutant) -> tuple[Mutant, str, float]:
            copy, begun = copies.get(), time.monotonic()
            try:
                return mutant, outcome(copy, mutant), time.monotonic() - begun
            finally:
                copies.put(copy)

        yield from pool.map(one, mutants)


def main(arguments: list[str] | None = None) -> int:
    from planted import MUTANTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only faults with it in their file or code")
    parser.add_argument("--workers", type=int, default=2, help="faults tested at the same time")
    chosen = parser.parse_args(arguments)
    mutants = [mutant for mutant in MUTANTS if chosen.word in f"{mutant.file} {mutant.old}"]
    for mutant in mutants:  # before the first test: the list is true as a whole
        planted((HERE / mutant.file).read_text(), mutant)
    begun, counts = time.monotonic(), Counter()
    for mutant, said, seconds in outcomes(HERE, mutants, chosen.workers):
        counts[said] += 1
        old, new = (" ".join(code.split())[:60] for code in (mutant.old, mutant.new))
        print(
            f"{said:14} {seconds:5.0f} s  {mutant.file.removeprefix('datasetdm_fast/'):28} {old}  ->  {new}", flush=True
        )
        if said in (MISSED, BROKEN):
            print(f"{'':24}{mutant.harm}; {mutant.tests[:90]}", flush=True)
    noticed = counts[NOTICED] + counts[HANGS]
    print(f"{noticed} of {len(mutants)} faults noticed in {time.monotonic() - begun:.0f} s")
    return int(counts[BROKEN] > 0 or noticed < LEAST_NOTICED * len(mutants))


if __name__ == "__main__":
    sys.exit(main())
