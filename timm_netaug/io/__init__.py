"""Files: checkpoints, exported folders, data sets, and the context manager that every file is written through."""
