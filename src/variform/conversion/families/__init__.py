"""One file a foreign family: its config map and its name table."""
