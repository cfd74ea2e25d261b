"""What each host makes of its settings."""
