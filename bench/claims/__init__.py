"""The papers' claims in the demo world's size."""

from bench.claims.run import main

__all__ = ["main"]
