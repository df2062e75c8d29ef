"""What the commands under test import, so that the process they are forked from has it."""

import os
from contextlib import suppress

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow  # noqa: F401

import cifar_exp.cli.hydra_app
import cifar_exp.cli.main
import cifar_exp.cli.predict
import cifar_exp.cli.report
import cifar_exp.cli.train
import cifar_exp.cli.verify
import cifar_exp.parity.run
import cifar_exp.runs.classifier
import cifar_exp.runs.run
import cifar_exp.study.sweep_report
import cifar_exp.tracking.deliveries

with suppress(Exception):  # as ranks do, which say why they cannot
    import cifar_exp.cpu_kernels.layers  # noqa: F401
