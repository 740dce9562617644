"""What a training run optimizes, and by what: objective, weights, hypergradient, solver, rates."""
