"""Networks of our own, built with the operations they are given."""
