"""Fault injection: real faults, one after another, and a table of the results: ``uv run python -m tests.faults``."""
