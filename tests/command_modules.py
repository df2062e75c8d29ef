"""What the commands under test import, so that the process they are forked from has it."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow  # noqa: F401
