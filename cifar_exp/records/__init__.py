"""The run folder on disk: journal, checkpoints, exported model. Also finds a run's folder."""
