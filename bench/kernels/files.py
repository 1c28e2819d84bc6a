"""Every file that holds a kernel: the operations, and what several of them launch."""

from datasetdm_fast.kernels import OPS, described_product, merge_statistics

FILES = (*OPS.values(), described_product, merge_statistics)
