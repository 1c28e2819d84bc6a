"""--engine auto in a long run on a CPU: the fastest of the engines that agree, kept by the run folder."""

import json
import time

import pytest

from datasetdm_fast.config import RunConfig
from datasetdm_fast.engines import build_engine
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.generation import job, racing
from datasetdm_fast.loading import load_model


@pytest.fixture(scope="module")
def opened():
    return build_engine("fast", load_model("tiny"), device="cpu")


class Rival:
    """The opened engine, slower or faster by a wait, or with another answer."""

    def __init__(self, opened, name: str, seconds: float, error: float = 0.0):
        self.opened, self.name, self.seconds, self.error = opened, name, seconds, error
        self.device, self.model, self.decoders = opened.device, opened.model, opened.decoders
        self.encode_text, self.fingerprint = opened.encode_text, opened.fingerprint

    def denoise(self, *inputs):
        time.sleep(self.seconds)
        return self.opened.denoise(*inputs) * (1 + self.error)


@pytest.fixture
def rivals(opened, monkeypatch):
    """Engines by name, in place of those that are installed."""
    there: dict[str, object] = {}

    def build(name, *_, **options):
        assert options == {"dtype": "fp32", "device": "cpu"}
        if isinstance(there[name], Exception):
            raise there[name]
        return there[name]

    monkeypatch.setattr(racing, "_others", lambda name: list(there))
    monkeypatch.setattr(racing, "build_engine", build)
    return there


def test_the_fastest_that_agrees_wins(opened, rivals):
    slow = Rival(opened, "fast", 0.2)
    rivals |= {"openvino": Rival(opened, "openvino", 0.0), "ort": Rival(opened, "ort", 0.1)}
    rivals |= {
        "wrong": Rival(opened, "wrong", 0.0, 1e-3),
        "absent": Missing("no graphs", ""),
        "bf16": Refused("no", ""),
    }
    race = racing.fastest(slow, 2, 10**9)
    told = race.told
    assert (
        race.engine is rivals["openvino"]
        and 0 < race.seconds < 0.2
        and told.startswith("openvino of openvino ")
        and told.endswith(" s a call")
    )
    assert [part.split()[0] for part in told.split(" of ")[1].split(", ")] == ["openvino", "ort", "fast"]


def test_the_opened_engine_stays_unless_another_is_clearly_faster(opened, rivals, monkeypatch):
    rivals["openvino"] = Rival(opened, "openvino", 0.1)
    race = racing.fastest(opened, 2, 10**9)
    assert race.engine is opened and race.told.startswith("fast of fast ")
    monkeypatch.setattr(racing, "LEAST_GAIN", 10**9)
    slow = Rival(opened, "fast", 0.2)
    assert racing.fastest(slow, 2, 10**9).engine is slow


def test_a_short_run_has_no_race_and_its_calls_are_those_of_the_plan(opened, rivals, monkeypatch):
    rivals["openvino"] = RuntimeError("it was built")
    calls, inner = [], opened.denoise
    monkeypatch.setattr(opened, "denoise", lambda *inputs: calls.append(1) or inner(*inputs))
    race = racing.fastest(opened, 2, 1)
    assert (race.engine, race.told) == (opened, "") and race.seconds > 0 and len(calls) <= 2


def test_what_is_not_installed_takes_no_part(monkeypatch):
    def check(name):
        if name == "openvino":
            raise Missing("not here", "")

    monkeypatch.setattr(racing, "check_engine", check)
    assert racing._others("fast") == ["ort"]


def test_a_run_folder_keeps_the_engine(monkeypatch):
    asked = []
    monkeypatch.setattr(job.opening, "open_engine", lambda *_, **chosen: (asked.append(chosen["engine"]), {}))
    for engine, stored in (
        ("auto", None),
        ("auto", {"engine": {"engine": "openvino"}}),
        ("auto", {"engine": {"engine": "torch"}}),
        ("fast", {"engine": {"engine": "openvino"}}),
    ):
        job.engine_of(RunConfig(engine=engine), stored)
    assert asked == ["auto", "openvino", "auto", "fast"]


def test_the_plan_and_run_json_name_the_winner(tmp_path, monkeypatch, capsys):
    from datasetdm_fast.generate import main

    chosen = []

    def fastest(engine, batch_size, calls):
        chosen.append((batch_size, calls))
        told = engine.fingerprint() | {"engine": "ort"}
        engine.fingerprint = lambda: told
        return racing.Race(engine, "ort of ort 0.1 s, fast 0.2 s a call", 0.1)

    monkeypatch.setattr(racing, "fastest", fastest)
    line = f"--number 3 --batch-size 2 --steps 2 --task depth --device cpu --out {tmp_path / 'run'}"
    assert main(line.split()) == 0
    assert "race       ort of ort 0.1 s, fast 0.2 s a call" in capsys.readouterr().err
    assert chosen and chosen[0][0] == 2 and chosen[0][1] % 2 == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["engine"]["engine"] == "ort"
