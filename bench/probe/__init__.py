"""Which form of each heavy operation is fastest on a GPU at the sizes of Stable Diffusion 1.4."""
