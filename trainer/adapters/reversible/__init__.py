"""Reversible layers, bit-exact, around whatever trains inside them."""
