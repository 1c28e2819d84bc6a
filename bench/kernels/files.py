"""Every file that holds a kernel: the operations, and what several of them launch."""

from datasetdm_fast.kernels import OPS, group_norm_plane, merge_statistics

FILES = (*OPS.values(), group_norm_plane, merge_statistics)
