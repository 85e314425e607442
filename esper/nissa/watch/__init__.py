"""A live view of a run in the terminal: of a folder here, or of one elsewhere over TCP."""
