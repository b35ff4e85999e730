"""Optimizers of whole parameters: what each keeps for one, and how it takes a step."""
