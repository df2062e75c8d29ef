"""The settings: their types and ranges, how they are read and checked, and the messages about wrong values."""
