"""Complements to torch's automatic differentiation: kernels, differences, random state."""
