"""What a model reads: text, picture tokens in blocks, their positions and the mask; documents → training batches.

`prompt.py` · `patches.py` which positions form a block · `positions.py` · `mask.py` · `perturbation.py` bit flips · `noise.py` an
image's random numbers · `batch.py`.
"""
