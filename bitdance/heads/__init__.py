"""Heads: hidden states of a block in, bits out."""
