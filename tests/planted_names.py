"""Class names of strangers: what a file name, a page or a parser may trip over."""

HOSTILE_NAMES = ("a/b", "../x", "n" * 200, "🦖 dino", "<b>&\"'", "a, b: c", "null")
