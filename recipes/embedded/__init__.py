"""The embedded task: real handwritten digits, questions about them, and noisy step labels.

Data flow: ``sheets`` (2 x 2 pictures of real scans, split by index) -> ``questions`` (questions and
their right solutions) -> ``student`` (solutions with realistic mistakes) -> ``sources`` (step
labels of mixed quality) -> ``build`` (JSONL and PNG files). ``pretrain`` trains the tiny InternVL
base model that ships as package data.
"""
