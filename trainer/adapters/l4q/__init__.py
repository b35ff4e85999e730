"""L4Q: adapters and a rounding that are learned together, for one matrix of integers at the end."""
