"""What the commands under test import, so that the process they are forked from has it."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow  # noqa: F401

import cifar_exp.commandline
import cifar_exp.main
import cifar_exp.parity_run
import cifar_exp.predict
import cifar_exp.report
import cifar_exp.run
import cifar_exp.verify  # noqa: F401
