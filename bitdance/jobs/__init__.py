"""Many pictures: requests → jobs → batches → files.

`job.py` · `prompt_file.py` · `outputs.py` the folder that they go to · `runner.py` the spec of a run, and what runs its batches.
"""
