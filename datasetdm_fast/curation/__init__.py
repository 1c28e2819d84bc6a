"""Samples of a run folder are scored and filtered; none is changed and none deleted."""
