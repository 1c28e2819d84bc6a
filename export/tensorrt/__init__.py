"""Stages as TensorRT plans."""
