"""--dtype auto in a long run: half precision where verify's gates hold, which the run folder keeps."""

import json
from dataclasses import replace

import pytest
from run_steps import prepare
from test_schemas import check_run

from datasetdm_fast import generate
from datasetdm_fast.command_line.run_settings import read_spec
from datasetdm_fast.config import HALF, LABELLER_KINDS
from datasetdm_fast.engine.engines import device
from datasetdm_fast.runs.agreement import comparing
from datasetdm_fast.runs.agreement.comparing import compare_with_reference
from datasetdm_fast.runs.agreement.verify import GateRow, Verdict
from datasetdm_fast.runs.jobs import job, run
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.settings import EngineSettings, ModelSettings

pytestmark = pytest.mark.usefixtures("tiny_has_one_layer")


def test_a_run_folder_keeps_the_engine(monkeypatch):
    asked = []
    monkeypatch.setattr(job.engines, "open_engine", lambda *_, **chosen: (asked.append(chosen["engine"]), {}))
    for engine, stored in (
        ("auto", None),
        ("auto", {"engine": {"engine": "openvino"}}),
        ("auto", {"engine": {"engine": "torch"}}),
        ("fast", {"engine": {"engine": "openvino"}}),
    ):
        job.open_engine(ModelSettings(), EngineSettings(engine=engine), ("semantic",), stored)
    assert asked == ["auto", "openvino", "auto", "fast"]


@pytest.fixture
def halved(monkeypatch):
    """A CPU whose half precision is bf16, runs of two images long enough, and the verdict as a list of failed measures;
    the reference is not asked.
    """
    failed: list[str] = []
    monkeypatch.setattr(device, "half_of", lambda _: "bf16")
    monkeypatch.setattr(run, "LEAST_MEASURED", 2)
    compared = []

    def compare(one, number, _):
        compared.append((one.engine.fingerprint()["dtype"], number))
        rows = [GateRow(name, 1.0, 1.0, (0.0, 0.0), None, 0) for name in failed]
        passed = [GateRow("image", 0.0, 0.0, (0.0, 0.0), None, 0)]
        return Verdict(passed + rows, one.engine.fingerprint(), {"engine": "torch"}, {"number": number})

    monkeypatch.setattr(comparing, "compare_with_reference", compare)
    return failed, compared


def made(folder, *more: str) -> dict:
    few = "--model tiny --task semantic --steps 2 --device cpu --prompts".split()
    assert generate.main([*few, "a ball", "--out", str(folder), *more]) == 0
    return json.loads((folder / "run.json").read_text())


def test_half_precision_is_taken_where_the_gates_hold_and_kept(tmp_path, halved, capsys):
    _, compared = halved
    two = "--number", "2", "--verify", "2"
    document = made(tmp_path / "run", *two, "--limit", "1")
    told = capsys.readouterr().err
    assert "precision  bf16, as it agrees in all 1 measures with torch on 2 samples" in told
    assert "verified   2 samples agreed before" in told
    assert document["engine"]["dtype"] == "bf16" and document["verified"]["agrees"]
    assert document["precision"] == {"tried": "bf16", "number": 2, "failed": []}
    assert made(tmp_path / "run", *two)["engine"]["dtype"] == "bf16" and compared == [("bf16", 2)]
    assert "precision  " not in capsys.readouterr().err
    check_run(tmp_path / "run")


@pytest.mark.parametrize("half", ["", "bf16"])
def test_a_plan_warns_where_bf16_is_emulated(half, capsys, monkeypatch):
    monkeypatch.setattr(device, "half_of", lambda _: half)
    for dtype in ("fp32", "bf16"):
        line = (
            f"--dry-run --number 2 --model tiny --prompts a --allow-unnamed --device cpu --engine fast --dtype {dtype}"
        )
        assert generate.main(line.split()) == 0
        told = "this processor has no bf16 and emulates it; fp32 is faster" in capsys.readouterr().err
        assert told == (dtype == "bf16" and not half)


def test_fp32_is_taken_where_a_gate_fails(tmp_path, halved, capsys, monkeypatch):
    failed, compared = halved
    failed.append("free depth")
    assert generate.main(["--dry-run", "--number", "2", "--model", "tiny", "--prompts", "a", "--allow-unnamed"]) == 0
    assert "precision  bf16 if the first samples agree with torch, else fp32" in capsys.readouterr().err
    document = made(tmp_path / "run", "--number", "2", "--limit", "1")
    assert "precision  fp32, as bf16 does not agree with torch in free depth" in capsys.readouterr().err
    assert document["engine"]["dtype"] == "fp32" and document["precision"]["failed"] == ["free depth"]
    asked = []
    monkeypatch.setattr(job.engines, "open_engine", lambda *_, **chosen: (asked.append(chosen["dtype"]), {}))
    for engine, dtype in (("auto", "auto"), ("torch", "auto"), ("auto", "bf16")):
        job.open_engine(ModelSettings(), EngineSettings(engine=engine, dtype=dtype), ("semantic",), document)
    assert asked == ["fp32", "auto", "bf16"] and compared == [("bf16", 2)]


def test_what_compares_nothing(tmp_path, halved, monkeypatch):
    """A short run, a precision or an engine by name, labels that no gate judges, a run folder that is there."""
    config = RunConfig(model="tiny", number=2, out=str(tmp_path / "run"))
    others = {"number": 1}, {"dtype": "fp32"}, {"engine": "torch"}, {"compile": True}, {"task": ("bright",)}
    monkeypatch.setitem(LABELLER_KINDS.others, "bright", None)
    spec = read_spec(replace(config, prompts="a ball"))

    def tries_half(number=2, **changes):
        engine = {name: value for name, value in changes.items() if name != "task"}
        labels = {name: value for name, value in changes.items() if name == "task"}
        changed = replace(
            spec, number=number, engine=replace(spec.engine, **engine), labels=replace(spec.labels, **labels)
        )
        return run.tries_half(changed, None)

    assert tries_half(task=("attention",)) and tries_half() and not any(tries_half(**each) for each in others)
    assert not run.tries_half(spec, {})


def test_a_device_without_half_precision_stays_in_fp32(halved, monkeypatch):
    monkeypatch.setattr(device, "half_of", lambda _: "")
    engine, _ = job.engines.open_engine("tiny", None, dtype=HALF, device="cpu")
    assert engine.fingerprint()["dtype"] == "fp32"


def test_the_reference_of_a_comparison_is_let_go(tmp_path):
    config = RunConfig(model="tiny", number=1, steps=2, prompts="a ball", task=("semantic",), out=str(tmp_path / "run"))
    one = prepare(config)
    assert compare_with_reference(one, 1).agrees
    assert not any(network.is_built for network in one.engine.model.networks.values())
