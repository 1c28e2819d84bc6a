"""Kernels that no GPU has confirmed: operation -> kind of GPU -> rows as in BLOCKS of its file, where tuning begins.

`--tune` prints such a row for BLOCKS if it is faster than what is launched today; what no GPU confirms goes out again.
"""

from datasetdm_fast.kernels.described_product import SUFFIX
from datasetdm_fast.kernels.launch import Blocks, block_sizes

TILES = {"BLOCK_C": 128, "BLOCK_K": 64, "PROGRAMS": 1}
CANDIDATES: dict[str, dict[str, Blocks]] = {
    "linear_activation": {"sm_90": block_sizes(f"linear_activation {SUFFIX}", 8, 3, bits=(16,), BLOCK_S=128, **TILES)},
    "norm_linear": {
        "sm_90": block_sizes(f"norm_linear {SUFFIX}", 8, 3, bits=(16,), BLOCK_S=128, **TILES)
        | block_sizes(f"norm_linear gated {SUFFIX}", 8, 3, bits=(16,), BLOCK_S=128, **TILES)
    },
}
