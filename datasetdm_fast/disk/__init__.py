"""Files on disk: written whole or not at all, locked, and SQLite databases that refuse in plain words."""
