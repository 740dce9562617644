"""Optimizers as pure functions, with the derivative of their update."""
