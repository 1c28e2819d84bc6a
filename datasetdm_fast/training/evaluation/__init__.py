"""Measuring labels against ground truth, and learning curves."""
