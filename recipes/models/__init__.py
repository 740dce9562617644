"""The model that a command computes with: loaded, asked, and its frozen front kept."""
