"""Records: files of every known format, read, checked, written."""
