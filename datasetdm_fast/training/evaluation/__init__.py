"""Measuring labels against ground truth, and how much they help a student network."""
