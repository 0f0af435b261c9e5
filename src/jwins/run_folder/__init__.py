"""Writing and reading the files of a run folder."""
