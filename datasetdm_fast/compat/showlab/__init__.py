"""DatasetDM's scripts by their own names: python -m datasetdm_fast.compat.showlab SCRIPT [its flags]."""
