"""Bases: how the pretrained weights are stored while something else trains."""
