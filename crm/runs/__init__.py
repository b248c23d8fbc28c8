"""What every run needs, of whatever kind: lease, control, retries, progress."""
