"""Job definitions, the command line, ready-made jobs."""
