"""What hosting takes on any host: hooks, settings, a controller, a cluster. It names no host."""
