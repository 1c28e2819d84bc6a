"""A labelled image at any size: selected, decoded, framed, augmented."""
