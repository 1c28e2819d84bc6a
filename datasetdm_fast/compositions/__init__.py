"""New run folders out of the samples of finished ones."""
