"""P-Decoders: how they are built, and how they are stored."""
