"""The demo world, whose ground truth is known: scenes by seed, and their labels."""
