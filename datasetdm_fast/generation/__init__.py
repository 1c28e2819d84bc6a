"""From prompts to committed samples."""
