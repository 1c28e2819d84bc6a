"""New run folders made from samples of finished ones."""
