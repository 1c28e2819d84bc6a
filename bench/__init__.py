"""Measurements of this package: python -m bench NAME, from the root of a checkout."""
