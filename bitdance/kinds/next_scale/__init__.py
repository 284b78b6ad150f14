"""Next-scale prediction (VAR, Infinity)."""
