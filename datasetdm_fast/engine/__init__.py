"""A prompt becomes a labelled sample in memory: no file but weights, no flag, no ledger."""
