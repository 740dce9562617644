"""Activations of the frozen front of a model, kept from step to step."""
