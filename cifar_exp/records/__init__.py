"""A run's folder on disk: journal, checkpoints, exported model, and how a run is found."""
