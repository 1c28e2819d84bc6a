"""The run folder: written atomically and rebuilt from its ledger."""
