"""Turning labelled images into captures and training targets."""
