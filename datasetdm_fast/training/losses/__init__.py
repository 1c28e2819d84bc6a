"""Losses of the decoders, and the objective of a step."""
