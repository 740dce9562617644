"""Examples that stay in their file: a small outline of each in memory, the rest read on demand.

``sources`` reads a record again where it lies, ``outline`` holds what is asked of every example,
and ``examples`` makes a sequence of both.
"""
