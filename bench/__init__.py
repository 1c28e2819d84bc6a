"""Measurements: every row is timed only after it agreed with its naive form in the same process."""
