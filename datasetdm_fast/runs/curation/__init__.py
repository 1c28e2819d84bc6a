"""Scoring and filtering samples of a run folder; none is changed or deleted."""
