"""The modules that commands under test import. The process that they are forked from imports them once."""

import importlib
import os
from contextlib import suppress

from cifar_exp.cpu_kernels.fuse import preload

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

for name in (
    *("mlflow", "jinja2.ext", "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.Image", "torch._dynamo"),
    *("cifar_exp.cli.hydra_app", "cifar_exp.cli.main", "cifar_exp.cli.predict", "cifar_exp.cli.report"),
    *(
        "cifar_exp.cli.train",
        "cifar_exp.cli.verify",
        "cifar_exp.data.synthetic",
        "cifar_exp.display.page",
        "cifar_exp.display.training_figure",
    ),
    *("cifar_exp.launch.elastic", "cifar_exp.models.networks", "cifar_exp.parity.run", "cifar_exp.runs.classifier"),
    *("cifar_exp.runs.run", "cifar_exp.sweeps.sweep", "cifar_exp.runs.train_composed"),
    *("cifar_exp.study.sweep_report", "cifar_exp.tracking.deliveries"),
):
    importlib.import_module(name)

with suppress(Exception):  # as ranks do, which say why they cannot
    preload()
