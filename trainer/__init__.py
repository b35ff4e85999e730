"""The SPMD core: models, sequence parallelism, data, steps, checkpoints. Knows nothing of Ray."""
