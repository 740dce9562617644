"""The weights of a run as one can look at them, and a page that shows whole runs."""
