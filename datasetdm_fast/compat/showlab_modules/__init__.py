"""Modules that DatasetDM's scripts import, by the names they use, over this package's engines and decoders."""
