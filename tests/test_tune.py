"""Tuning of kernels: sizes that are wrong or do not fit are never chosen, and what was found can be pasted."""

import math
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench.kernels import audit, tune
from bench.kernels.inputs import cases_of
from bench.machine import limits
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.kernels import fused, launch, layer_norm, linear_geglu

CPU = torch.device("cpu")
SIZES = {"BLOCK_S": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def test_neighbours_change_one_size_within_its_limits():
    found = list(tune.neighbours(SIZES | {"num_warps": 16}))
    assert [one["BLOCK_S"] for one in found[:2]] == [32, 128] and all(one["num_warps"] in (8, 16) for one in found)
    assert sorted(one["num_stages"] for one in found if one["BLOCK_S"] == 64 and one["num_warps"] == 16) == [1, 3]
    assert len({tuple(one.items()) for one in found}) == len(found) == 5


def test_the_way_down_ends_at_the_fastest_that_is_right():
    table, key = {}, ("some kernel", 16)

    def cost():
        sizes = table[key]
        return math.inf if sizes["num_stages"] > 2 else abs(math.log2(sizes["BLOCK_S"]) - 9) + sizes["num_warps"] + 1

    best, least = tune.descend(table, key, SIZES, cost, 8.0, time.monotonic() + 60)
    assert best == SIZES | {"BLOCK_S": 512, "num_warps": 1} == table[key] and least == 2.0
    assert tune.descend(table, key, SIZES, cost, 8.0, 0.0) == (SIZES, 8.0)  # no time left: what there was


def test_a_kernel_is_timed_without_the_launches_of_the_host(monkeypatch):
    """One that is small takes a GPU less time than Python needs to launch it: any size would seem equally fast."""
    replayed, recorded = [], []

    class Graph:
        def replay(self):
            replayed.append(len(recorded))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(limits, "wait", lambda device: None)
    found = limits.device_rate(lambda: recorded.append(1), torch.device("cuda"), 0.0)
    assert len(recorded) == 2 + limits.MOST_RECORDED == replayed[0] and len(replayed) > 3
    assert found > limits.MOST_RECORDED / limits.WINDOW


@pytest.mark.skipif(not launch.IS_INTERPRETED, reason="kernels run in the interpreter where there is no GPU")
def test_a_kernel_is_tuned_and_a_wrong_one_has_no_time(monkeypatch):
    case = cases_of("layer_norm")[0].inputs
    monkeypatch.setattr(tune, "sizes_of", lambda op: lambda drawn: [("small", case)])
    monkeypatch.setattr(tune, "WINDOW", 0.0)
    monkeypatch.setattr(layer_norm, "BLOCKS", {"untuned": dict(layer_norm.BLOCKS["untuned"])})
    (judged,) = tune.judged_cases("layer_norm", "fp32", CPU)
    rows = list(tune.op_rows("layer_norm", "fp32", CPU, [judged], time.monotonic() + 1))
    assert [row.get("kernel", row.get("form")) for row in rows] == ["layer_norm", "fused", "plain"]
    assert rows[0]["bits"] == 32 and rows[0]["after_s"] <= rows[0]["before_s"]
    assert judged.seconds(lambda *inputs: fused.layer_norm(*inputs) * 1.01, CPU) == math.inf
    monkeypatch.setattr(fused, "layer_norm", lambda *inputs: fused.missing(*inputs))
    assert [
        row["form_s"] for row in tune.op_rows("layer_norm", "fp32", CPU, [judged], 0.0) if row.get("form") == "fused"
    ] == [None]


def test_a_kernel_by_descriptors_is_tuned_from_its_row_of_the_gpu(monkeypatch):
    """And the one by pointers without it, as it would not be launched beside it."""
    usual, own = linear_geglu.BLOCKS["untuned"], dict(linear_geglu.BLOCKS["sm_90"])
    monkeypatch.setattr(linear_geglu, "BLOCKS", {"untuned": dict(usual), "sm_90": own})
    monkeypatch.setattr(tune, "names_of", lambda device: ("sm_90", "untuned"))
    (key,), (first,) = own, map(dict, own.values())

    def total(form, cases, device):
        return 1 / own[key]["num_stages"] if key in own else 2 / own["linear_geglu", 16]["num_stages"]

    monkeypatch.setattr(tune, "total", total)
    rows = list(tune.op_rows("linear_geglu", "fp16", torch.device("cuda"), [], time.monotonic() + 60))
    most = tune.LARGEST_OPTIONS["num_stages"]
    assert [row["kernel"] for row in rows] == ["linear_geglu", "linear_geglu described"]
    assert rows[0]["sizes"] == usual["linear_geglu", 16] | {"num_stages": most} and rows[0]["after_s"] == 2 / most
    assert rows[1]["sizes"] == own[key] == first | {"num_stages": most}
    assert (rows[1]["before_s"], rows[1]["after_s"]) == (1 / first["num_stages"], 1 / most)
    document = {"machine": {"device": "GPU", "capability": "9.0"}, "parts": {"a": {"status": "done"}}}
    form = {"op": "linear_geglu", "form": "fused", "form_s": 1.0}
    document["parts"]["a"]["rows"] = [*rows, form]
    assert any("PROGRAMS=1" in line for line in tune.table_lines(document))


def test_the_fastest_form_is_right_everywhere_and_the_rows_can_be_pasted():
    def form(name, seconds, dtype="fp16"):
        return {"op": "geglu", "form": name, "dtype": dtype, "case": "c", "form_s": seconds}

    rows = [form("fused", 1.0), form("plain", 2.0), form("fused", 1.0, "bf16"), form("plain", 2.0, "bf16")]
    assert tune.fastest(rows) == {"geglu": "fused"} and tune.fastest([*rows, form("fused", None)]) == {"geglu": "plain"}
    kernel = {"kernel": "geglu", "bits": 16, "sizes": SIZES, "before_s": 2.0, "after_s": 1.0}
    document = {
        "machine": {"device": "Some GPU", "capability": "9.0"},
        "parts": {"geglu fp16": {"status": "done", "rows": [kernel, *rows]}},
    }
    said = tune.table_lines(document)
    assert said[0] == "kernels/geglu.py, DEVICES['sm_90'] = 'fused', BLOCKS['sm_90'] ="
    assert said[1].strip() == '| block_sizes("geglu", 4, 2, bits=(16,), BLOCK_S=64)'


def test_what_is_tuned_by_itself_is_what_a_run_launches():
    """gpu_budget.json, which a test compares with the launches, names only kernels that can be tuned."""
    running = tune.running()
    assert "attention_capture" in running and set(running) <= set(audit.kernels_of(()))
    assert {one for types in running.values() for one in types} <= set(audit.DTYPES)


def test_the_command_wants_a_gpu_and_one_thing_to_do(monkeypatch):
    monkeypatch.setattr(launch, "IS_INTERPRETED", False)
    with pytest.raises(Refused, match="--audit and --tune"):
        audit.main([])
    if launch.triton is not None and not torch.cuda.is_available():
        with pytest.raises(Missing, match="no CUDA device"):
            audit.main(["--tune"])


def test_a_row_serves_every_gpu_of_its_compute_capability(monkeypatch):
    """An H200 takes what was measured on an H100; only where its kind has no row its own name and the rest count."""
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    launch.names_of.cache_clear()
    assert launch.names_of(card) == ("sm_90", "NVIDIA H200", "untuned")
    rows = {name: {("geglu", 16): {"num_warps": place}} for place, name in enumerate(reversed(launch.names_of(card)))}
    x = SimpleNamespace(device=card, element_size=lambda: 2)
    assert launch.blocks(rows, "geglu", x) == {"num_warps": 2}
    assert launch.blocks({name: rows[name] for name in ("NVIDIA H200", "untuned")}, "geglu", x) == {"num_warps": 1}
    assert launch.blocks({"sm_90": {}, "untuned": rows["untuned"]}, "geglu", x) == {"num_warps": 0}
    launch.names_of.cache_clear()
