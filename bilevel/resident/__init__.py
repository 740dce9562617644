"""A step in place: θ, its gradient and the optimizer's moments have one copy each.

The mathematics is that of ``BilevelSolver``; what differs is where the numbers live. ``parts`` cuts
the leaves into parts whose temporaries stay in a cache, ``update`` and ``adam`` take the
optimizer's step in place, part by part, ``lower_first`` and ``upper_first`` are the two orders of
``OneStep``, and ``solver`` has ``ResidentSolver``.
"""
