"""The kernels: compiled for GPUs that need not be there, and tuned on one that is."""
