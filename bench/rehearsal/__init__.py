"""The CUDA path on tensors without memory: what a run would launch on a GPU, in which order, and what is wrong with
it.
"""
