"""Reading, checking and writing the records of every known format."""
