"""The run folder: written once, never torn, rebuilt from its ledger."""
