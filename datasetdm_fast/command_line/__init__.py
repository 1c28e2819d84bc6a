"""What every command shares: flags, progress, signals and the way a command ends."""
