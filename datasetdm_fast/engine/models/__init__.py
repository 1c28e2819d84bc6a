"""Our own networks, built with the operations they are given."""
