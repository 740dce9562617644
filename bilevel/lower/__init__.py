"""The lower level: one pass over a batch, and derivatives of its gradient."""
