"""The figures that people compare: pictures of a benchmark, scores of pictures, and what stands beside every score.

`sets.py` which prompts a benchmark has and how its scripts want the pictures → `run.py` makes them · `samples.py` pictures of any
place → `features.py` → `scores.py` the arithmetic → `score.py` figures (`figure.py`) → `compare.py`, `card.py`.
"""
