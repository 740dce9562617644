"""The model that a command computes with: loaded, asked, kept in parts or by its frozen front."""
