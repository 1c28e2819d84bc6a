"""Scenes of the harder world, read as hard:COUNT@FIRST_SEED."""
