"""Comparing the tensors, images and labels of two engines."""
