"""What every command shares: flags, progress, signals and exit codes."""
