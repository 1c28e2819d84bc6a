"""Whether two engines give the same tensors, images and labels."""
