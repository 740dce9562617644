"""Batches: which examples share a pass, who prepares it, and how it reaches the device."""
