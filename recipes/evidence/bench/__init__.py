"""The cost of hypergradients, relative to the unavoidable minimum and to other libraries.

``python -m recipes.evidence.bench`` (``make bench``) measures the core on a small decoder: every
route, the unrolls, TorchOpt and Betty's convention. ``python -m recipes.evidence.bench embedded``
measures the routes on the embedded process reward model.
"""
