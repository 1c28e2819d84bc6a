"""Teaching a P-Decoder from labelled images: capture once, then fit."""
