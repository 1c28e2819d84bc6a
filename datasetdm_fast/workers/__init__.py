"""Several processes make one run."""
