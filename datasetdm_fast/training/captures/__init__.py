"""Training views: augmented images with their cached captures and their targets."""
