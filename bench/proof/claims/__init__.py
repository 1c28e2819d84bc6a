"""The papers' claims about generated images, in the size of the demo world."""
