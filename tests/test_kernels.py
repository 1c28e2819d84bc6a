"""Every op on each of its cases: the plain form in fp32 against itself in fp64, and the rearranged forms against the plain ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasetdm_fast.kernels import OPS, depth_head, pyramid, rearranged, reference

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


@pytest.mark.parametrize("plain,other", ((pyramid.reference, pyramid.projected), (depth_head.reference, depth_head.low_resolution)))
def test_rearranged_is_exact(plain, other):
    module = sys.modules[plain.__module__]
    for case in module.cases():
        inputs = doubled(case.inputs)
        assert distance(other(*inputs), plain(*inputs)) <= 1e-12, case.reason


def test_namespaces_offer_every_op():
    assert set(vars(reference)) == set(vars(rearranged)) == set(OPS)


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
