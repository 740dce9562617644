"""The comparison of methods, controls and settings on the embedded task over seeds.

Data flow: ``rows`` (what is trained for each row, as data) and ``settings`` (rows that vary one
option of another row) -> ``runs`` (run directories of one seed) -> ``statistics`` (means over
seeds with paired intervals) -> ``compare`` (the command, ``compare.json``) -> ``figures``.
"""
