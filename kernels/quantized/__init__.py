"""Quantized matrices: NormalFloat codes with doubly quantized scales, and integers with a scale for each row.

Torch only; this is what the formats mean. On GPUs and where it is installed, bitsandbytes reads the same bytes faster.
"""
