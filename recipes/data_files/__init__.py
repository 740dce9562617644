"""The commands on data files: validate, convert, inspect, split."""
