"""S2A's structure: biases, prompts and side modules, whose gradients need no stored input of a linear layer."""
