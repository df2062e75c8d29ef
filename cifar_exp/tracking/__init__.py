"""From the journal on disk to MLflow, also after an outage."""
