"""Checks of hypergradients: finite differences, comparison, diagnostics."""
