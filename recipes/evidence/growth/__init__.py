"""How time, memory and traffic grow: ``python -m recipes.evidence.growth AXIS``."""
