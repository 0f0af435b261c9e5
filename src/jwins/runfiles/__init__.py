"""The files of a run: rows, checkpoints, and how they are written."""
