"""Prompt lists for a data set: sentences of a grammar or of a language model, balanced over classes and measured."""
