"""Measurements of the library itself: cost, faults, real weights."""
