"""How a label lies in a file, and how it looks in a picture."""
