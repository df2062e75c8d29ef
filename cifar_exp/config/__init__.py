"""The settings: their types and ranges, how they are read, and the messages about wrong ones."""
