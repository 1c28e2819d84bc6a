"""Training a P-Decoder on labelled images: capture once, then fit."""
