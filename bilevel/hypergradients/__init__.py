"""The hypergradients: through one lower step, through several, at a solution, by a penalty."""
