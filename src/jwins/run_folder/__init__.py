"""The files of a run folder: how they are written, and how they are read."""
