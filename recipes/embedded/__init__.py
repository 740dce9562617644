"""The embedded task: real handwritten digits, questions about them, and noisy step labels.

Data flow: ``scans`` (real scans, split by index) -> ``sheets`` (2 x 2 pictures) -> ``questions``
(what is asked, how a right solution goes) -> ``solver`` (solutions with realistic mistakes) ->
``sources`` (step labels of mixed quality) -> ``build`` (JSONL and PNG files). ``pretrain`` makes
the tiny InternVL base model that ships as package data.
"""
