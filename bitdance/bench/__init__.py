"""What a picture costs and what this machine gives: shapes → work (FLOPs, bytes) and peak → floor; a real run → time by phase.

`plain.py` is the yardstick: the published procedure without any of our shortcuts. The command is `bitdance bench`.
"""

OWN = "own"  # in --preset: the model's settings
