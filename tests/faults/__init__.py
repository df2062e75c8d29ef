"""Real faults, one after another, and what became of each: ``uv run python -m tests.faults``."""
