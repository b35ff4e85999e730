"""Ray: gangs of actors, supervision and restart, metrics, submission."""
