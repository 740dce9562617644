"""Training: cold start, bilevel training, weights."""
