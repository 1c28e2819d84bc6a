"""New run folders out of finished ones, without a network."""
