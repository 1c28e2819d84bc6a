"""How the shipped demo model and its decoders were trained and evaluated: programs, each run by its name."""
