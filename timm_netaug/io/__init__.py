"""Files: checkpoints, exported folders, data sets, and atomic writing."""
