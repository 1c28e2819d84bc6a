"""Scores are made once, conditions decide what is kept, and nothing is ever deleted."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from rendered import document, rendered, write_run
from skips import IS_LONG
from test_ledger import tree

from datasetdm_fast import drop, filter, generate
from datasetdm_fast.command_line import output
from datasetdm_fast.data import Request
from datasetdm_fast.engine.labels.trust import NamedMap
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.curation import clip, filtering
from datasetdm_fast.runs.gallery.page import finish_run
from datasetdm_fast.runs.run_folder import scores as run_scores
from datasetdm_fast.runs.run_folder.audit import audit
from datasetdm_fast.runs.run_folder.corrections import read_corrections
from datasetdm_fast.runs.run_folder.document import LEDGER
from datasetdm_fast.runs.run_folder.folder import RunFolder, is_sealed
from datasetdm_fast.runs.run_folder.ledger import Ledger, Row
from datasetdm_fast.runs.run_folder.reader import open_run
from datasetdm_fast.runs.run_folder.scores import SCORES, read_scores
from datasetdm_fast.runs.run_folder.selections import FILTER, Filter, read_filter, read_split

NUMBER = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("filtered") / "run"
    write_run(path, NUMBER)
    return path


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def state(path: Path) -> dict[str, bytes]:
    """The files of a run folder's state with their bytes."""
    return {file.name: file.read_bytes() for file in sorted((path / "state").iterdir())}


def test_a_condition_keeps_some_and_deletes_nothing(run, capsys):
    shown = ("gallery/run.js", "gallery/pages/")  # the page tells the scores
    before = {name: content for name, content in tree(run).items() if not name.startswith(shown)}
    assert filter.main([str(run), "--where", "presence>=1", "--json", "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out)
    table = read_scores(open_run(run).ledger)
    passing = [index for index, value in zip(table.indices, table.values["presence"]) if value >= 1]
    assert facts["kept"] == len(passing) and facts["kept"] + facts["left_out"] == NUMBER
    assert [sample.row.request.index for sample in open_run(run, kept=True)] == passing
    assert len(open_run(run)) == NUMBER
    assert {name: content for name, content in tree(run).items() if name in before} == before
    assert audit(run).findings == []


def test_kept_json_says_why(run):
    assert filter.main([str(run), "--where", "sharpness >= 1e9 or not score < 2", "--quiet"]) == 0
    decided = json.loads((run / FILTER).read_text())
    assert decided["kept"] == [] and len(decided["left_out"]) == NUMBER
    for reason in decided["left_out"].values():
        assert reason.startswith("sharpness is ") and reason.endswith("expected >= 1e+09; score < 2 holds")


def test_undone_and_applied_again_it_is_the_same(run):
    line = [str(run), "--where", "sharpness > 200 and duplicate == 0", "--quiet"]
    assert filter.main([str(run), "--quiet"]) == 0
    scored = tree(run), state(run)
    assert filter.main(line) == 0
    kept = tree(run), state(run)
    assert kept != scored and audit(run).findings == []
    assert filter.main([str(run), "--undo", "--quiet"]) == 0
    assert (tree(run), state(run)) == scored and len(open_run(run, kept=True)) == NUMBER
    assert filter.main(line) == 0 and (tree(run), state(run)) == kept


def test_undo_counts_the_samples_that_were_made_after_the_filter(run, capsys):
    assert filter.main([str(run), "--where", "score < 2", "--quiet"]) == 0
    decided = json.loads((run / FILTER).read_text())
    (run / FILTER).write_text(json.dumps({**decided, "kept": decided["kept"][:-2]}))  # as before two more were made
    assert filter.main([str(run), "--undo"]) == 0
    assert "all samples are kept again, 2 had been left out" in "".join(capsys.readouterr())


def test_a_filter_that_was_killed_before_it_marked_the_page_is_made_good(run, monkeypatch):
    page, line = run / "gallery" / "left-out.js", ["--where", "sharpness > 200"]

    def killed(command):
        with monkeypatch.context() as patch:
            patch.setattr("datasetdm_fast.runs.run_folder.folder.mark_left_out", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                filter.main.__wrapped__([str(run), *command, "--quiet"])

    assert filter.main([str(run), *line, "--quiet"]) == filter.main([str(run), "--undo", "--quiet"]) == 0
    before = page.read_text()
    killed(line)
    assert page.read_text() == before and filter.main([str(run), "--quiet"]) == 0
    assert "sharpness is " in page.read_text() and audit(run).findings == []
    killed(["--undo"])
    assert filter.main([str(run), "--undo", "--quiet"]) == 0 and page.read_text() == before


def test_the_gallery_marks_what_is_left_out(run):
    assert filter.main([str(run), "--where", "sharpness > 200", "--quiet"]) == 0
    said = (run / "gallery" / "left-out.js").read_text()
    left_out = json.loads((run / FILTER).read_text())["left_out"]
    assert 0 < len(left_out) < NUMBER
    told = json.loads(said.removeprefix('receive("leftOut",0,').removesuffix(");\n"))
    assert {f"{index:08d}": reason for index, reason in told} == left_out
    (run / "gallery" / "left-out.js").unlink()  # written anew, it tells the same
    with RunFolder(run, open_run(run).document) as folder:
        finish_run(folder)
    assert (run / "gallery" / "left-out.js").read_text() == said


def test_the_gallery_shows_the_scores(run):
    assert "distance" not in (run / "gallery" / "run.js").read_text()
    assert filter.main([str(run), "--quiet"]) == 0
    told = json.loads((run / "gallery" / "run.js").read_text().removeprefix('receive("run",0,').removesuffix(");\n"))
    columns = json.loads((run / "gallery/pages/000000.js").read_text().partition(",0,")[2].removesuffix(");\n"))
    place = told["figures"].index("distance")
    with Ledger(run / LEDGER, read_only=True) as ledger:
        assert [figures[place] for figures in columns["figures"]] == [value for _, value in ledger.scores("distance")]
    assert audit(run).findings == []


def test_the_page_of_an_earlier_version_is_written_anew(run):
    shutil.rmtree(run / "gallery")
    (run / "gallery").mkdir()
    (run / "gallery" / "index.html").write_text("<html>all samples</html>")
    assert filter.main([str(run), "--where", "sharpness > 200", "--quiet"]) == 0
    assert "sharpness is " in (run / "gallery" / "left-out.js").read_text() and audit(run).findings == []


def test_scores_once_committed_stay(run):
    assert filter.main([str(run), "--quiet"]) == 0
    with RunFolder(run, open_run(run).document) as folder:
        before = folder.ledger.scores("sharpness")
        values = [value for _, value in before]
        assert values == [round(value, 6) for value in values] != [round(value, 5) for value in values]
        folder.ledger.add_scores([(0, "sharpness", -1.0)])
        assert folder.ledger.scores("sharpness") == before
        finish_run(folder)


def test_a_run_that_grew_gets_the_scores_that_it_lacks(tmp_path):
    path = tmp_path / "run"
    with RunFolder(path, document(6)) as folder:
        folder.add([rendered(k) for k in range(4)], {})
        finish_run(folder)
    assert filter.main([str(path), "--where", "score>0", "--quiet"]) == 0
    with RunFolder(path, document(6)) as folder:
        folder.add([rendered(k) for k in (4, 5)], {})
        finish_run(folder)
    assert len(open_run(path)) == 6 and len(open_run(path, kept=True)) == 4
    assert filter.main([str(path), "--where", "score>0", "--quiet"]) == 0
    assert len(open_run(path, kept=True)) == 6 and audit(path).findings == []


def test_kill_9_while_scoring(tmp_path):
    write_run(tmp_path / "a", 80)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    process = subprocess.Popen([sys.executable, "-m", "datasetdm_fast.filter", str(tmp_path / "a"), "--quiet"])
    while process.poll() is None and not (tmp_path / "a" / "state" / "ledger.sqlite-wal").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = [[str(tmp_path / name), "--where", "sharpness>200", "--quiet"] for name in "ab"]
    assert [filter.main(line) for line in lines] == [0, 0]
    assert state(tmp_path / "a") == state(tmp_path / "b") and audit(tmp_path / "a").findings == []


def test_a_run_whose_scoring_was_killed_at_its_very_end_is_closed_by_the_same_line(tmp_path, monkeypatch):
    write_run(tmp_path / "a", 6)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr("datasetdm_fast.runs.curation.filtering.finish_run", lambda folder: None)
        assert filter.main([str(tmp_path / "a"), "--quiet"]) == 0
    assert not is_sealed(tmp_path / "a")
    assert [filter.main([str(tmp_path / name), "--quiet"]) for name in "ab"] == [0, 0]
    assert is_sealed(tmp_path / "a") and state(tmp_path / "a") == state(tmp_path / "b")
    assert audit(tmp_path / "a").findings == []


def test_duplicates_are_found(tmp_path):
    path = tmp_path / "run"
    samples = [rendered(k) for k in (0, 1, 0, 2, 1)]
    twice = [
        type(sample)(Request(k, sample.request.prompt, k, sample.request.classes), sample.image, sample.annotations)
        for k, sample in enumerate(samples)
    ]
    with RunFolder(path, document(5)) as folder:
        folder.add(twice, {})
        finish_run(folder)
    assert filter.main([str(path), "--where", "duplicate==0", "--quiet"]) == 0
    assert [sample.id[-1] for sample in open_run(path, kept=True)] == ["0", "1", "3"]


def test_a_sample_is_no_duplicate_of_one_that_was_dropped(tmp_path):
    path, same = tmp_path / "run", rendered(0)
    with RunFolder(path, document(3)) as folder:
        folder.add([same, rendered(1)], {})
        finish_run(folder)
    assert filter.main([str(path), "--quiet"]) == 0 and drop.main([str(path), "0", "--quiet"]) == 0
    with RunFolder(path, document(3)) as folder:
        folder.add([replace(same, request=replace(same.request, index=2))], {})
        finish_run(folder)
    assert filter.main([str(path), "--where", "duplicate == 0", "--quiet"]) == 0
    assert [sample.id for sample in open_run(path, kept=True)] == ["00000001", "00000002"]


def test_histograms_count_every_sample_and_class(run, capsys):
    assert filter.main([str(run), "--json", "--quiet"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == set(SCORES) and shown.pop("clip") == shown.pop("domain") == []
    for bins in shown.values():
        assert sum(each["samples"] for each in bins) == NUMBER == bins[0]["left"]
    words = [word for sample in open_run(run) for word in sample.classes]
    assert shown["score"][0]["left_by_class"] == {word: words.count(word) for word in words}
    assert filter.main([str(run), "--quiet"]) == 0
    assert "score: mean confidence" in capsys.readouterr().out


def test_scores_whose_low_values_are_good_have_upper_thresholds():
    words, distances = [("ball",), ("cube",), ("ball",)], np.array([0.5, 2.0, 1.0])
    table = run_scores.ScoreTable([0, 1, 2], words, {"domain": distances, "sharpness": distances})
    bins = {name: filtering.compute_histogram(table, name) for name in table.values}
    found = [(each["most"], each["samples"], each["left"]) for each in bins["domain"]]
    assert found == [(2, 1, 3), (1, 1, 2), (0.5, 1, 1)]
    assert [(each["least"], each["left"]) for each in bins["sharpness"]] == [(0.5, 3), (1, 2), (2, 1)]
    assert bins["domain"][1]["left_by_class"] == {"ball": 2}
    told = "\n".join(filtering.histogram_lines(table, bins))
    assert told.count("at most") == told.count("at least") == 1


def test_a_file_that_goes_between_two_looks_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert read_filter(tmp_path) is None and read_split(tmp_path) is None and read_corrections(tmp_path) == {}


WRONG = [
    (["--where", "scor>=0.6"], "'scor' is not a score (did you mean score?)"),
    (["--where", "score=0.6"], "'score=0.6' is not a condition at character"),
    (["--where", "score>=0.6 and"], "'score>=0.6 and' is not a condition"),
    (["--where", "(score>=0.6"], "'(score>=0.6' is not a condition at character 1"),
    (["--where", "score>=0.6)"], "'score>=0.6)' is not a condition at character 11"),
    (["--where", "score>=high"], "'high' is not understood, expected a number"),
    (["--where", "__import__('os')"], "is not understood"),
    (["--where", "score>=0.6; drop"], "'score>=0.6; drop' is not a condition at character 11"),
    (["--where", "not " * 30 + "score>1"], "nested more than 20 deep"),
    (["--where", "0.5 < score < 0.9"], "is not understood, expected a comparison of a score"),
    (["--where", "score >= True"], "'True' is not understood, expected a number"),
    (["--where", "score>1 or " * 500 + "score>1"], "at most 2000 are read"),
    (["--where", " "], "no condition was given"),
    (["--where", "score>=1", "--undo"], "--undo: it removes the filter"),
    (["--undo"], "has not been filtered"),
    (["--clip", ""], "--clip: no folder was given"),
    (["--clip", "no/such/folder"], "holds no config.json"),
    (["--clip", "no/such/folder", "--dry-run"], "holds no config.json"),
    (["--threads", "-1"], "--threads -1"),
]


@pytest.mark.parametrize("flags, said", WRONG, ids=lambda value: str(value)[:24])
def test_bad_input_is_refused_and_nothing_written(flags, said, made, capsys):
    before = state(made)
    assert filter.main([str(made), *flags]) == 2
    assert said in capsys.readouterr().err and state(made) == before


def test_a_score_that_no_sample_has_is_refused(run, capsys):
    before = state(run)
    assert filter.main([str(run), "--where", "clip>0.2", "--quiet"]) == 2 and state(run) == before
    assert "--clip DIR" in capsys.readouterr().err and not (run / FILTER).exists()
    assert filter.main([str(run), "--where", "score>=0", "--quiet"]) == 0
    with pytest.raises(Refused, match="no sample of .* has the score clip") as refused:
        open_run(run).where("score >= 0 and clip > 0.2")
    assert "--clip DIR" in refused.value.remedy


def test_what_is_no_run_folder_is_refused(tmp_path, capsys):
    assert filter.main([]) == 2 and "RUN is missing" in capsys.readouterr().err
    assert filter.main([str(tmp_path / "none")]) == 2 and "not a run folder" in capsys.readouterr().err


def test_a_damaged_kept_json_is_refused(run, capsys):
    (run / FILTER).write_text('{"where": 3}')
    with pytest.raises(Refused, match="not a valid filter file"):
        open_run(run, kept=True)
    assert [each.place for each in audit(run).findings] == []  # no filter has sealed it
    assert filter.main([str(run), "--where", "score>=0", "--quiet"]) == 2
    assert "Run python -m datasetdm_fast.filter" in capsys.readouterr().err
    assert filter.main([str(run), "--undo", "--quiet"]) == 0 and not (run / FILTER).exists()
    assert filter.main([str(run), "--where", "score>=0", "--quiet"]) == 0
    (run / FILTER).write_text("{")
    with pytest.raises(Refused, match="not readable as JSON") as stop:
        open_run(run, kept=True)
    assert "--undo" in stop.value.remedy
    assert [each.place for each in audit(run).findings] == [FILTER]


def test_filtering_costs_about_as_much_as_writing_the_rows(tmp_path, monkeypatch):
    number, path = 100_000 if IS_LONG else 20_000, tmp_path / "run"
    monkeypatch.setattr(filtering, "finish_scored", lambda run: None)  # without images there is no page of them
    dice = np.random.default_rng(0)
    begin = time.process_time()
    with RunFolder(path, document(number)) as folder:
        folder.ledger.commit(Row(Request(k, f"a ball {k}", k, ("ball",)), {}) for k in range(number))
        for name, values in (("score", dice.random(number)), ("distance", dice.integers(0, 64, number))):
            folder.ledger.add_scores((k, name, value) for k, value in enumerate(values.tolist()))
    written = time.process_time()
    assert filter.main([str(path), "--where", "score>=0.6 and duplicate==0", "--quiet"]) == 0
    filtered = time.process_time()
    assert filtered - written < 4 * (written - begin)  # about as much, on machines of any speed
    assert abs(len(open_run(path, kept=True)) / number - 0.4 * 61 / 64) < 0.02


def test_conditions_follow_their_grammar():
    values = {"score": np.array([0.2, 0.7, np.nan]), "distance": np.array([1.0, 5.0, 9.0])}

    def passing(text):
        return run_scores.parse_where(text, tuple(values))[0].passes(values).tolist()

    assert passing("score>=0.5") == [False, True, False]
    assert passing("score != 0.7") == [True, False, False]  # a comparison with a score it lacks does not hold
    assert passing("not score>=0.5") == [True, False, True]
    assert passing("score>=0.5 or distance>8") == [False, True, True]
    assert passing("distance>0 and (score<.5 or distance == 9)") == [True, False, True]
    assert passing("score < 0.5 or score > 0.5 and distance > 8") == [True, False, False]  # and binds more tightly
    assert passing("distance > -1e0") == passing("distance > +0.5") == [True] * 3
    assert passing("score > 0.2") == [False, True, False] and passing("distance <= 5") == [True, True, False]
    nested = "score > 0"
    for depth in range(2, 22):
        nested = f"not ({nested})"
        if depth < 21:
            run_scores.parse_where(nested, tuple(values))
    with pytest.raises(Refused, match="nested more than 20 deep"):
        run_scores.parse_where(nested, tuple(values))
    long = "score > 0".ljust(2000)
    run_scores.parse_where(long, tuple(values))
    with pytest.raises(Refused, match="2001 characters, at most 2000"):
        run_scores.parse_where(f"{long} ", tuple(values))


def test_a_sample_is_left_out_for_what_it_lacks_and_nothing_else():
    values = {name: np.array([value]) for name, value in {"score": 0.4, "trust": 1.0, "clip": np.nan}.items()}
    for where, reason in (
        ("score >= 0.5 and trust == 1", "score is 0.4, expected >= 0.5"),
        ("score >= 0.5 and trust < 1", "score is 0.4, expected >= 0.5; trust is 1, expected < 1"),
        ("score >= 0.5 or trust == 0", "score is 0.4, expected >= 0.5; trust is 1, expected == 0"),
        ("trust == 1 and (score > 1 or clip != 0.2)", "score is 0.4, expected > 1; it has no clip, expected != 0.2"),
        ("trust != 0 and not score > 0.3", "score > 0.3 holds"),
        ("not (score <= -1 or trust == 1)", "score <= -1 or trust == 1 holds"),
    ):
        condition, _ = run_scores.parse_where(where, SCORES)
        assert not condition.passes(values)[0] and condition.reason(values, 0) == reason, where


def test_presence_and_confidence_are_means_over_kinds_of_labels():
    tables = {"semantic": {"classes": ["wall", "ball", "cube"]}, "depth": {"max_depth": 10.0}}
    image, records = np.zeros((50, 20, 3), np.uint8), {"semantic": {"pixels": {"0": 990, "1": 2, "2": 1}}, "depth": {}}

    def presence(*named):
        return run_scores.presence(run_scores.Scored(image, named, records, None, tables, None))

    assert [presence(), presence("ball"), presence("cube"), presence("ball", "cube", "dog")] == [1.0, 1.0, 0.0, 0.5]
    sure = {"semantic": {"mean_confidence": 0.5}, "instance": [{"score": 1.0}, {"score": 0.5}], "depth": {}}
    scores = [run_scores.SCORERS["score"](SimpleNamespace(records=each)) for each in (sure, {"depth": {}})]
    assert scores == [(0.5 + 0.75) / 2, None]


def test_sharpness_and_hash_tell_images_apart():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    assert run_scores.sharpness(noise) > 100 * run_scores.sharpness(noise.resize((8, 8)).resize((64, 64)))
    small = Image.fromarray(np.random.default_rng(1).integers(0, 255, (5, 4, 3), np.uint8))
    grey = np.asarray(small.convert("L")).astype(float)
    edges = [
        grey[y - 1, x] + grey[y + 1, x] + grey[y, x - 1] + grey[y, x + 1] - 4 * grey[y, x]
        for y in (1, 2, 3)
        for x in (1, 2)
    ]
    assert run_scores.sharpness(small) == pytest.approx(np.var(edges))
    assert filtering.difference_hash(noise) == filtering.difference_hash(noise.copy())
    many = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 150)
    words = [int(number) % 2**64 for number in many]
    apart = [min([64, *((word ^ other).bit_count() for other in words[:k])]) for k, word in enumerate(words)]
    for first in (0, 70, 150):
        assert run_scores.nearest_bits(many, np.arange(first, 150), np.arange(150)).tolist() == apart[first:]
    hashes = np.array([0, 7, 7, -1, 2**62], np.int64)
    assert run_scores.nearest_bits(hashes, np.arange(5), np.arange(5)).tolist() == [64, 3, 0, 61, 1]
    assert run_scores.nearest_bits(hashes, np.arange(3, 5), np.arange(5)).tolist() == [61, 1]
    assert run_scores.nearest_bits(hashes, np.array([2, 4]), np.array([0, 3])).tolist() == [3, 1]


class Hashes:
    """A ledger of samples that have hashes alone; some are dropped."""

    def __init__(self, hashes):
        self.values, self.dropped = {"hash": dict(enumerate(hashes)), "distance": {}}, set()

    def indices(self):
        return [index for index in self.values["hash"] if index not in self.dropped]

    def scores(self, name):
        return sorted(self.values[name].items())

    def add_scores(self, scores, *, replaces):
        self.values["distance"] |= {index: value for index, _, value in scores}


def test_distances_are_renewed_where_dropped_and_restored_samples_decide_them(monkeypatch):
    dice, compared = np.random.default_rng(0), []
    monkeypatch.setattr(run_scores, "TILE", (4, 8))
    hashes = [int(number) for number in dice.integers(0, 2**7, 120)]  # of which many are equally near to others
    ledger, count = Hashes(hashes), np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda bits: compared.append(bits.size) or count(bits))
    run_scores.add_distances(ledger)
    for _ in range(60):
        if ledger.dropped and dice.random() < 0.5:
            changed = set(dice.choice(sorted(ledger.dropped), 1).tolist())
            ledger.dropped -= changed
        else:
            changed = set(dice.choice(120, dice.integers(1, 3)).tolist())
            ledger.dropped |= changed
        run_scores.add_distances(ledger, changed)
        for index in ledger.indices():
            others = [hashes[other] for other in ledger.indices() if other < index]
            expected = min([64, *((hashes[index] ^ other).bit_count() for other in others)])
            assert ledger.values["distance"][index] == expected
    hashes = dice.integers(-(2**63), 2**63 - 1, 2000).tolist()
    ledger, counts = Hashes(hashes), []
    for changed in (), {5}:
        compared.clear()
        ledger.dropped |= set(changed)
        run_scores.add_distances(ledger, changed)
        counts.append(sum(compared))
    assert counts[1] < counts[0] / 20


def test_agreement_counts_pixels_with_one_name():
    first = NamedMap(np.array([[0, 1], [2, 2]]), ("wall", "ball", "cube"))
    second = NamedMap(np.array([[0, 1], [1, 2]]), ("", "ball", "cube"))
    assert run_scores.agreement([first, second]) == pytest.approx(2 / 3)
    assert run_scores.agreement([first]) is None
    assert run_scores.agreement([first, first, second]) == pytest.approx((4 + 2 + 2) / (4 + 3 + 3))
    empty = NamedMap(np.zeros((2, 2), int), first.names)
    assert run_scores.agreement([empty, empty]) == 1.0
    assert run_scores.agreement([first, NamedMap(np.zeros((2, 2), int), ("", "dog"))]) is None


def ledger_of(words, **scores):
    """A ledger of samples with these class words, and scores {name: {index: value}}."""
    return SimpleNamespace(
        class_words=lambda: list(words.items()), scores=lambda name: list(scores.get(name, {}).items())
    )


def test_duplicates_differ_by_two_bits_of_their_hash_at_most():
    ledger = ledger_of(dict.fromkeys(range(5), ()), distance={0: 64, 1: 2, 2: 3, 3: 0, 9: 0})
    values = read_scores(ledger, ("duplicate", "distance")).values
    assert values["duplicate"][:4].tolist() == [0, 1, 0, 1] and values["distance"][:4].tolist() == [64, 2, 3, 0]
    assert all(np.isnan(column[4]) for column in values.values())  # it is not scored yet


def test_the_sharpness_is_the_variance_of_the_laplacian_inside_of_the_border():
    grey = np.array([[9, 0, 0, 9], [0, 10, 0, 3], [0, 0, 7, 0], [9, 1, 0, 9]], np.uint8)
    assert run_scores.sharpness(Image.fromarray(grey)) == np.var([-40, 20, 18, -28])
    red = np.stack([grey, 0 * grey, 0 * grey], 2)  # 0.299 as bright
    assert run_scores.sharpness(Image.fromarray(red)) == np.var([-12, 6, 5, -8])


def test_the_hash_of_an_image_tells_which_cells_are_darker_than_their_right_neighbours():
    brighter = np.arange(9, dtype=np.uint8)[None].repeat(8, 0) * 20
    first, last = np.zeros((2, 8, 9), np.uint8)
    first[0, 1], last[7, 8] = 50, 50
    edges = np.uint8([[60] * 3 + [0, 0, 171, 171] + [0] * 20]).repeat(16, 0)  # cells of 60, 57 and 57 in the mean
    shown = (brighter, brighter[:, ::-1], first, last, brighter.repeat(4, 0).repeat(3, 1), edges)
    found = [filtering.difference_hash(Image.fromarray(np.ascontiguousarray(pixels))) for pixels in shown]
    assert found == [-1, 0, -(2**63), 1, -1, 0]


def test_a_histogram_tells_what_a_threshold_at_each_of_its_bins_leaves():
    words = [("ball",), ("ball", "cube"), ("cube",), ("ball",), ()]
    table = run_scores.ScoreTable([*range(5)], words, {"score": np.array([0.2, 0.2, 0.5, np.nan, 0.9])})
    bins = filtering.compute_histogram(table, "score")
    wanted = [(0.2, 2, 4, {"ball": 2, "cube": 2}), (0.5, 1, 2, {"cube": 1}), (0.9, 1, 1, {})]
    assert bins == [dict(zip(("least", "samples", "left", "left_by_class"), each)) for each in wanted]
    lines = [line.split() for line in filtering.histogram_lines(table, {"score": bins, "trust": []})]
    assert lines[0][0] == "score:" and lines[1] == ["from", "samples", "at", "least", "ball", "cube"]
    assert lines[2] == ["0.2", "2", "#" * 24, "4", "2", "2"] and lines[3] == ["0.5", "1", "#" * 12, "2", "0", "1"]
    assert lines[4:] == [["0.9", "1", "#" * 12, "1", "0", "0"], []]
    rare = run_scores.ScoreTable([], [()] * 101, {"score": np.array([0.5] * 100 + [0.9])})
    told = [*filtering.histogram_lines(rare, {"score": filtering.compute_histogram(rare, "score")})]
    assert told[-2].split() == ["0.9", "1", "#", "1"]  # a bin of few has a bar, too

    def least(values):
        found = filtering.compute_histogram(run_scores.ScoreTable([], [()] * len(values), {"score": values}), "score")
        return [(each["least"], each["samples"], each["left"]) for each in found]

    assert least(np.arange(8.0)) == [(k, 1, 8 - k) for k in range(8)]
    assert least(np.arange(17.0)) == [(2 * k, 2 + (k == 7), 17 - 2 * k) for k in range(8)]  # the last takes the end
    assert least(np.full(3, np.nan)) == []
    near = run_scores.ScoreTable([*range(3)], [()] * 3, {"duplicate": np.array([0.0, 9.0, 4.0])})
    bins = filtering.compute_histogram(near, "duplicate")
    assert [(each["most"], each["samples"], each["left"]) for each in bins] == [(9, 1, 3), (4, 1, 2), (0, 1, 1)]


def test_a_bin_of_few_samples_has_a_bar():
    bins = [
        {"least": least, "samples": n, "left": 0, "left_by_class": {}}
        for least, n in ((0, 1), (1, 100), (2, 0), (3, 50))
    ]
    lines = list(filtering.histogram_lines(run_scores.ScoreTable([], [], {}), {"score": bins, "clip": []}))
    assert [line.count("#") for line in lines] == [0, 0, 1, 24, 0, 12, 0] and lines[1].split()[-2:] == ["at", "least"]


def test_what_a_filter_keeps_is_told_in_all_and_of_each_class():
    ledger = ledger_of({0: ("ball",), 1: ("ball", "cube"), 2: ("cube",), 3: ()})
    run, decision = SimpleNamespace(ledger=ledger, path="RUN"), Filter("score > 0", (0, 3), {1: "", 2: ""})
    facts, lines = filtering.summarize(run, decision, "are")
    assert facts.pop("classes") == {"ball": [1, 2], "cube": [0, 2]}
    assert facts == {"where": "score > 0", "kept": 2, "left_out": 2}
    assert lines[0] == "2 of 4 samples are kept; RUN/state/kept.json says why the others are not"
    assert lines[1:] == ["of each class: ball 1 of 2, cube 0 of 2"]
    assert filtering.summarize(run, decision, "would be")[1][0] == "2 of 4 samples would be kept"


def test_a_clip_sees_the_middle_of_an_image_by_its_own_mean_and_deviation():
    image = np.zeros((2, 6, 3), np.uint8)
    image[:, 2:4] = (255, 0, 51)
    wanted = np.array([(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711])
    for pixels in (image, image.transpose(1, 0, 2)):
        found = clip.Clip._pixels(SimpleNamespace(side=2), np.ascontiguousarray(pixels))
        assert found.shape == (3, 2, 2) and np.allclose(found, wanted[:, None, None], atol=1e-6)
    whole = clip.Clip._pixels(SimpleNamespace(side=4), np.full((3, 9, 3), 255, np.uint8))
    assert whole.shape == (3, 4, 4) and np.allclose(whole[0], wanted[0], atol=1e-6)  # made larger


def test_a_clip_is_given_what_transformers_makes_of_an_image_and_every_block_of_samples(monkeypatch, tmp_path):
    import torch
    from transformers import CLIPImageProcessor

    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    expected = CLIPImageProcessor(**sides)(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    assert np.allclose(clip.Clip._pixels(SimpleNamespace(side=32), image), expected, atol=1e-6)
    turned = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (3.0, 4.0)}  # by what they show, all images alike
    one = object.__new__(clip.Clip)
    one.side, one.length = 2, 16
    one.tokenizer = lambda prompts, **_: {"input_ids": prompts, "attention_mask": None}
    one.model = lambda input_ids, **_: SimpleNamespace(
        image_embeds=torch.tensor([[1.0, 0.0]] * len(input_ids)),
        text_embeds=torch.tensor([turned[k] for k in input_ids]),
    )
    monkeypatch.setattr(clip, "BATCH", 2)
    samples = [SimpleNamespace(image=image[:4, :4], prompt=prompt) for prompt in "abc"]
    assert one.scores(samples) == [1.0, 0.0, 0.6]
    for name in ("config.json", "merges.txt", "README.md"):
        (tmp_path / name).write_text("{}")
    digest = clip.digest_of(tmp_path)
    (tmp_path / "README.md").write_text("other")
    assert clip.digest_of(tmp_path) == digest
    (tmp_path / "merges.txt").write_text("other")
    assert clip.digest_of(tmp_path) != digest


def test_scoring_shows_how_many_are_scored_unless_it_is_quiet(run, monkeypatch, capsys):
    monkeypatch.setattr(output, "SECONDS_PER_LINE", 0)
    shutil.copytree(run, other := run.with_name("other"))
    assert filter.main([str(run)]) == 0 and f"{NUMBER}/{NUMBER} images" in capsys.readouterr().err
    assert filter.main([str(other), "--quiet"]) == 0 and capsys.readouterr().err == ""


def test_clip_scores_come_from_a_local_folder(run, tmp_path, capsys, monkeypatch):
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path / "clip"
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    words = ["<|startoftext|>", "<|endoftext|>", *(chr(k) for k in range(97, 123))]
    words += [f"{word}</w>" for word in words[2:]]
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 1},
            vision_config={**small, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    ).save_pretrained(folder)
    (tmp_path / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(folder)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("datasetdm_fast.engine.engines.device.cores_of_mask", lambda: 64)
    monkeypatch.setattr("datasetdm_fast.engine.engines.device.count_cores", lambda: 1)  # of which a container has time
    assert filter.main([str(run), "--clip", str(folder), "--where", "clip > -2", "--quiet"]) == 0
    assert chosen == [1]
    with Ledger(run / "state" / "ledger.sqlite", read_only=True) as ledger:
        found = [value for _, value in ledger.scores("clip")]
    assert len(found) == NUMBER and all(-1 <= value <= 1 for value in found) and len(set(found)) > 1
    before, config = state(run), CLIPModel.from_pretrained(folder).config
    assert filter.main([str(run), "--clip", str(folder), "--json"]) == 0 and state(run) == before
    CLIPModel(config).save_pretrained(folder)  # other weights
    assert filter.main([str(run), "--clip", str(folder), "--where", "clip > -2", "--quiet"]) == 0
    with Ledger(run / "state" / "ledger.sqlite", read_only=True) as ledger:
        others = [value for _, value in ledger.scores("clip")]
    assert len(others) == NUMBER and not set(found) & set(others)
    assert filter.main([str(run), "--clip", str(tmp_path / "none"), "--quiet"]) == 2
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "vision" not in name}, folder / "model.safetensors")
    capsys.readouterr()
    assert filter.main([str(run), "--clip", str(folder), "--quiet"]) == 3
    assert "tensors of a CLIP, such as vision_model." in capsys.readouterr().err
    assert len(open_run(run, kept=True)) == NUMBER and audit(run).findings == []


def test_filtering_needs_no_torch(run):
    code = "import sys\nfrom datasetdm_fast import filter\nfilter.main(sys.argv[1:])\nprint('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False"


def test_generate_still_finds_its_run_complete(run, monkeypatch):
    assert filter.main([str(run), "--where", "score>=0", "--quiet"]) == 0
    before = state(run)
    with RunFolder(run, open_run(run).document) as folder:
        finish_run(folder)
    assert state(run) == before and callable(generate.main)


def test_a_clip_that_transformers_cannot_read_is_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Missing, match=f"--clip {tmp_path}: transformers cannot read it"):
        clip.Clip(tmp_path, "")
