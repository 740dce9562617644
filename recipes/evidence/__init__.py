"""Measurements of the library itself: its cost, its fault tolerance, and a run on real weights."""
