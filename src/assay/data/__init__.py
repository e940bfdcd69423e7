"""Data sets, one file a family; a module-level DATASET is found by its file's name."""
