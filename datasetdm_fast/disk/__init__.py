"""Files on disk: atomic writes, locks, and SQLite databases with plain error messages."""
