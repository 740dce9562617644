"""Model inputs: from a record to tokens, image tiles and label positions."""
