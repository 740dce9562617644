"""Options of the commands: fields, presets, parsing, rules."""
