"""What generated images are worth: students trained with and without them, and the claims of the papers."""
