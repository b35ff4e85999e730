"""Measure, plan, place: what a step keeps on the device and what it does not."""
