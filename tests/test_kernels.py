"""Every op on each of its cases: the plain form in fp32 against itself in fp64, and the rearranged forms against the plain ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasetdm_fast.kernels import OPS, compiled, depth_head, pyramid, rearranged, reference

FLOOR = 1e-6
CASES = [pytest.param(op, case, id=f"{name}-{case.reason}") for name, op in OPS.items() for case in op.cases()]


def doubled(value):
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(doubled(one) for one in value) if isinstance(value, (list, tuple)) else value


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-12))


@pytest.mark.parametrize("op,case", CASES)
def test_reference_against_double(op, case):
    answer = op.reference(*case.inputs)
    exact = op.reference(*doubled(case.inputs))
    assert answer.dtype == torch.float32 and exact.dtype == torch.float64
    assert tuple(answer.shape) == tuple(exact.shape) == case.shape
    assert torch.isfinite(answer).all()
    # Normalising planes a hundred deviations from zero costs two digits.
    assert distance(answer, exact) <= (1e-4 if "far from zero" in case.reason else FLOOR)


@pytest.mark.parametrize(
    "plain,other", ((pyramid.reference, pyramid.projected), (depth_head.reference, depth_head.low_resolution), (depth_head.reference, depth_head.compiled))
)
def test_rearranged_is_exact(plain, other):
    module = sys.modules[plain.__module__]
    for case in module.cases():
        inputs = doubled(case.inputs)
        assert distance(other(*inputs), plain(*inputs)) <= 1e-12, case.reason


def test_namespaces_offer_every_op():
    assert set(vars(reference)) == set(vars(rearranged)) == set(vars(compiled)) == set(OPS)


def test_a_level_without_maps_is_exact():
    features = [torch.randn(2, channels, 6, 6, dtype=torch.float64) for channels in (5, 8)]
    attention = [tuple(torch.randn(2, 3, size, 4, dtype=torch.float64) for size in (36, 7, 7)) for _ in range(2)]
    weight = torch.randn(9, 5 + 8 + 2 * 3 * 7, 1, 1, dtype=torch.float64)
    maps = [torch.softmax(q @ k.transpose(2, 3) / 2, -1) for q, k, _ in attention]
    level, answers = pyramid.without_maps(features, attention, weight, 11)
    assert distance(level, pyramid.reference(features, maps, weight, 11)) <= 1e-12
    for answer, written, (_, _, v) in zip(answers, maps, attention, strict=True):
        assert distance(answer, written @ v) <= 1e-12


def test_narrow_levels_are_summed_in_fp32():
    features, maps = [torch.randn(1, 64, 8, 8) for _ in range(12)], [torch.softmax(torch.randn(1, 8, 64, 77), -1)]
    weight = torch.randn(32, 12 * 64 + 8 * 77, 1, 1) * 0.03
    exact = pyramid.reference(*doubled((features, maps, weight)), 8)
    narrow = [[x.bfloat16() for x in tensors] for tensors in (features, maps)]
    budget = distance(pyramid.reference(*narrow, weight.bfloat16(), 8), exact)
    assert distance(pyramid.projected(*narrow, weight.bfloat16(), 8), exact) <= 2 * budget


def test_queries_share_no_blocked_cell():
    """A query that blocked all but one cell returns that cell's value."""
    q, k, v, _ = (noise.double() for noise in torch.randn(4, 1, 2, 3, 4))
    blocked = torch.ones(1, 3, 3, dtype=torch.bool)
    blocked[0, :, 1] = False
    answer = reference.masked_attention(q, k, v, blocked)
    assert torch.allclose(answer, v[:, :, 1:2].expand_as(answer))


def test_bare_import_is_refused():
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", "import kernels"], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 1 and "import datasetdm_fast.kernels" in ran.stderr.splitlines()[-1]
