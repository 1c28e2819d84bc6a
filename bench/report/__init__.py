"""Result files as tables, charts and a page."""
