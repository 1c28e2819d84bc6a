"""What becomes of a run folder: whether it is complete, goes on or grows; other settings are refused."""

from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torchless
from run_steps import prepare

from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.run import count_rows, find_result, may_differ, relocated_paths
from datasetdm_fast.runs.jobs.writing import write_missing
from datasetdm_fast.runs.run_folder import document
from datasetdm_fast.runs.run_settings import RunConfig

NUMBER = 4


@pytest.fixture
def decide(monkeypatch, tmp_path):
    torchless.install(monkeypatch.setattr)

    def decide(**changes):
        config = RunConfig(**{"number": NUMBER, "batch_size": 2, "out": str(tmp_path / "run"), **changes})
        spec, stored = read_spec(config), document.read_document(tmp_path / "run")
        result = find_result(spec, stored)
        return SimpleNamespace(
            result=result,
            missing=spec.number - count_rows(spec.folder),
            grows=stored is not None and document.grows(stored["config"], spec.identity),
        )

    decide.write = lambda limit: write_missing(
        prepare(RunConfig(number=NUMBER, batch_size=2, limit=limit, out=str(tmp_path / "run")))
    )
    return decide


def test_a_folder_without_run_json_is_new(decide):
    decision = decide()
    assert (decision.result, decision.missing, decision.grows) == (None, NUMBER, False)


def test_missing_samples_are_resumed(decide):
    decide.write(3)
    decision = decide()
    assert (decision.result, decision.missing, decision.grows) == (None, 1, False)


def test_a_larger_number_grows_the_run(decide):
    decide.write(0)
    decision = decide(number=NUMBER + 3)
    assert (decision.result, decision.missing, decision.grows) == (None, 3, True)


def test_a_complete_run_is_done(decide):
    decide.write(0)
    decision = decide()
    assert decision.result.done == NUMBER and decision.missing == 0 and not decision.grows
    assert decide(engine="torch").result.done == NUMBER  # which decides no more than rounding


def test_other_settings_are_refused(decide):
    decide.write(1)
    with pytest.raises(Refused, match="seed: 0 there, 5 asked for"):
        decide(seed=5)


def test_settings_that_were_the_models_own_are_told_and_given_as_figures(decide):
    decide.write(1)
    with pytest.raises(Refused, match=r"\(guidance: 2.0 there, 4.0 asked for; steps: 2 there, 20 asked for\)"):
        decide(steps=20, guidance=4.0)
    assert decide(steps=2, guidance=2.0).result is None


def test_settings_that_are_left_out_are_told_as_such(decide, tmp_path):
    write_missing(prepare(RunConfig(number=NUMBER, batch_size=2, steps=2, limit=1, out=str(tmp_path / "run"))))
    with pytest.raises(Refused, match=r"\(steps: 2 there, nothing asked for\)"):
        decide()


def test_run_json_is_read_once(decide, monkeypatch):
    decide.write(1)
    reads = []
    read = document.parse_document
    monkeypatch.setattr(document, "parse_document", lambda content, path: reads.append(path) or read(content, path))
    decide()
    assert len(reads) == 1


def test_an_engine_of_other_versions_may_be_another(decide, tmp_path):
    decide.write(1)
    spec = read_spec(RunConfig(number=NUMBER, batch_size=2, out=str(tmp_path / "run")))
    described = document.read_document(tmp_path / "run")
    assert not may_differ(spec, None)
    for versions, differs in (
        ({"torch": version("torch")}, False),
        ({"torch": "0.1"}, True),
        ({"openvino": ""}, find_spec("openvino") is not None),
    ):
        assert may_differ(spec, described | {"engine": versions}) == differs


def test_a_run_may_be_another_where_settings_differ_that_decide_no_more_than_rounding(decide, tmp_path):
    decide.write(1)
    stored = document.read_document(tmp_path / "run") | {"engine": {}}
    for changes, differs in (
        ({}, False),
        ({"batch_size": 4}, True),
        ({"dtype": "fp16"}, True),
        ({"compile": True}, True),
    ):
        config = RunConfig(**{"number": NUMBER, "batch_size": 2, "out": str(tmp_path / "run"), **changes})
        assert may_differ(read_spec(config), stored) == differs
        assert not may_differ(read_spec(replace(config, mixed="no")), stored)


def test_files_that_cannot_be_read_are_not_those_of_the_run(tmp_path):
    stored = {"config": {"decoder": "before", "model": "demo"}, "decoders": {"depth": {"digest": "ab"}}}
    for name in (str(tmp_path), str(tmp_path / "none"), "before"):
        assert relocated_paths("demo", name, 64, stored) == {}
