"""What hypergradients cost, side by side with what cannot be avoided and with peers.

``python -m recipes.evidence.bench`` (``make bench``) measures the core on a small decoder: every
route, the unrolls, TorchOpt and Betty's convention. ``python -m recipes.evidence.bench embedded``
measures the routes on the embedded process reward model.
"""
