"""Command lines of DatasetDM, run by this package's engines."""
