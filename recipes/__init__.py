"""Where the three libraries meet: commands, training runs, embedded data, reports."""
