"""Model folders: names of parts and files, checks from headers, reading, writing, other layouts, adapters, card.

`parts.py` names, once · `sizes.py` · `stored.py` tensors in files, piece by piece · `diffusers.py` the other layout ·
`config.py` a folder, checked → its configs · `fingerprint.py` · `adapters.py` · `checkpoint.py` folder ⇄ model · `source.py`,
`conversion.py` layout → layout, no model held whole · `card.py`.
"""
