"""The machine: its limits and counters."""
