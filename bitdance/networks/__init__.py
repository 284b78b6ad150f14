"""The networks around the head, and how they run.

`backbone.py`, `projector.py` · `attention.py`, `cache.py` · `kernels.py`, `precision.py`, `quantize.py`, `offload.py`.
"""
