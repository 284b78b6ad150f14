"""The binary diffusion head.

`flow.py` path and velocity · `network.py` config, network and loss · `sampler.py` solvers and guidance · `settings.py` what a
user may choose · `block_sampler.py` one block's sampling, compiled and recorded on CUDA.
"""
