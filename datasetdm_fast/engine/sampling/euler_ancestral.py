"""Euler's method with fresh noise at every call."""

from functools import partial

from datasetdm_fast.engine.sampling.euler import euler, noise_scale
from datasetdm_fast.engine.sampling.schedule import Sampler

SAMPLER = Sampler(partial(euler, is_ancestral=True), memory=0, noise_scale=partial(noise_scale, is_ancestral=True))
