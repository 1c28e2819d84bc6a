"""Labelled images become captures and training targets."""
