"""Command lines and modules of DatasetDM and Dataset Diffusion, run by this package's engines."""
