"""Is a model folder sound, does it equal another one, and do two renditions of a model predict the same bits?

`examine.py` one folder · `compare.py` two folders, tensor by tensor · `agree.py` two renditions, teacher-forced.
"""
