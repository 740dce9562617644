"""The step in place beside the original's on an InternVL with random weights and its vocabulary."""
