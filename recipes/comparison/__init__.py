"""The comparison of methods and controls on the embedded task over seeds."""
