"""What making pictures costs: memory, operations and bytes, from configs alone, and what this machine offers.

`shapes.py` configs of published models · `memory.py` of a batch, and how much is free · `peak.py` what a machine gives at best ·
`work.py` operations and bytes by phase.
"""
