"""A check with real pretrained weights: SmolLM2-135M judges solutions of the Game of 24."""
