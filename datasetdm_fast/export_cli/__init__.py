"""The command export: flags, calibration, and plan commands for other machines."""
