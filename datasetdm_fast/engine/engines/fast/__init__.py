"""The fast engine: our own networks without repeated work. FastEngine(...) is the one of its device."""

from datasetdm_fast.engine.engines.fast.engine import CHUNK_PIXELS, DTYPES, FastEngine, slice_of
from datasetdm_fast.engine.models.packed import state_distance

__all__ = ["CHUNK_PIXELS", "DTYPES", "FastEngine", "slice_of", "state_distance"]
