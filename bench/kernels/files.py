"""Every file that holds a kernel: the operations, what several of them launch, and candidates."""

from bench.kernels import described_product, norm_linear
from datasetdm_fast.kernels import OPS, group_norm_plane, merge_statistics

FILES = (*OPS.values(), group_norm_plane, merge_statistics, described_product, norm_linear)
