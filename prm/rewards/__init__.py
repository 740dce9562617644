"""A trained reward model in the form in which other projects call one."""
