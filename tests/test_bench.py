"""The bench: its rows agree at small widths, and nothing is timed that did not."""

import json

import pytest
import torch

from bench import __main__ as bench
from bench import capture, measure
from datasetdm_fast.errors import GateFailed, Refused


def test_an_unknown_command_names_the_known():
    with pytest.raises(Refused, match="(?s)unknown measurement 'nothing'.*capture, kernels"):
        bench.dispatch(["nothing"])


def test_a_wrong_answer_is_not_timed():
    calls = []

    def naive():
        calls.append("naive")
        return [torch.ones(3)]

    with pytest.raises(GateFailed, match="differ by"):
        measure.compare("row", naive, lambda: [torch.ones(3) * 1.01], 5, 1e-5)
    assert calls == ["naive"]


def test_peak_sees_what_was_allocated_and_freed():
    answer, grown = measure.with_peak(lambda: float(torch.ones(64 * 2**18).sum()))  # 64 MiB
    assert answer == 64 * 2**18 and 60 * 2**20 <= grown <= 100 * 2**20


def test_capture_prints_rows_that_agree(capsys):
    assert capture.main(["--quick", "--rounds", "1", "--rows", "capture,capture_attention", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for name in ("capture", "capture_attention"):
        assert rows[name]["error"] <= capture.LIMIT and rows[name]["time_ratio"] > 0 and rows[name]["memory_ratio"] > 1
