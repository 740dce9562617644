"""Selection among candidates, and figures of it."""
