"""A step in place: θ, its gradient and the optimizer's moments have one copy each.

The mathematics is that of ``BilevelSolver``; what differs is where the numbers live. ``parts`` cuts
the leaves into parts whose temporaries stay in a cache; on a device, where each operation is a
launch, ``streamed`` hands over a gradient leaf by leaf, and ``pieces`` puts it together. ``update``
and ``adam`` take the optimizer's step in place, ``lower_first`` and ``upper_first`` are the two
orders of ``OneStep``, and ``solver`` has ``ResidentSolver``.
"""
