"""PEQA: integers that stay, scales that train."""
