"""Models: loading, saving, adapters, conversion."""
