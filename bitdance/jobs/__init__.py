"""Many pictures: requests → jobs → batches → files.

`job.py` · `prompt_file.py` · `outputs.py` the folder that they go to · `runner.py` the spec of a run, and the maker of its batches.
"""
