"""Losses of the decoders, and the training objective of a batch."""
