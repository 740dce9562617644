"""A run directory: what is written, kept, resumed, refused."""
