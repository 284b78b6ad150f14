"""Refinement (GRN)."""
