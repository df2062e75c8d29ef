"""Everything that knows of ranks: process group, collectives, gradient averaging, heartbeats."""
