"""Selection among candidates, and the metrics that evaluate it."""
