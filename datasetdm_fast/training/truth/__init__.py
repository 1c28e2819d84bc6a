"""Ground truth: labelled images of any size, selected, decoded, framed and augmented."""
