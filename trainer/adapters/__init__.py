"""Adapters: one folder each, with what it changes in a model, from outside."""
