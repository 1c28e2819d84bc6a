"""Pictures that exist: read, checked and framed as the networks take them."""
