"""Samplers: each a schedule of linear updates, one file each."""
