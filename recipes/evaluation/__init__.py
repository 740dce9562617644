"""Best-of-N figures of a model: candidates, leaks, results table."""
