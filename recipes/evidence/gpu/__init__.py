"""A bilevel step of InternVL3-1B on one GPU: ``recipes/evidence/gpu.sh``, in nine minutes at most.

``case`` is the list of what is measured, most telling first; ``subject`` the model and the
contenders of ``recipes.evidence.bench.race`` on it; ``meter`` time, memory and launches on a
device; ``answer`` a case's figures; ``worker`` the process that finds them, and ``measuring`` what
ends it where a case takes too long; ``agreement`` and ``targets`` what the figures are compared
with; ``table`` all of it as text.
"""
