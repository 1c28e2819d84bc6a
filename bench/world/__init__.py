"""How the shipped demo model and its decoders were trained and judged: programs, each run by its name."""
