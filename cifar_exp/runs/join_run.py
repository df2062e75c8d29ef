"""One of the other hosts of a run: it runs ranks for host 0, and has no run folder, no tracker and no display."""

import time
from dataclasses import replace
from functools import partial

from cifar_exp.config.schema import Config
from cifar_exp.data.validation_split import hold_out
from cifar_exp.launch.devices import find_devices
from cifar_exp.launch.elastic import ElasticLauncher
from cifar_exp.launch.hosts import greeted, joined
from cifar_exp.runs.components import Components
from cifar_exp.runs.config_changes import config_hash
from cifar_exp.runs.plan_job import new_job
from cifar_exp.system.accelerator import check_precision
from cifar_exp.system.printable import print_notice
from cifar_exp.system.temp_folder import private_folder
from cifar_exp.training.plan import make_plan
from cifar_exp.worker.train_job import run_rank


def join_run(config: Config, components: Components) -> None:
    """Run this host's ranks until host 0 ends the run.

    Raises:
        CifarExpError: as on host 0, with its exit code; or this host cannot take part.
        Stopped: a signal stopped the run.
    """
    launcher = components.launcher
    assert isinstance(launcher, ElasticLauncher)
    settings = launcher.host_settings()
    started = time.monotonic()
    devices = find_devices(config.devices, settings.hosts)
    check_precision(config.train.precision, devices.accelerator)
    data = hold_out(components.dataset(), config.validation)
    size = devices.world_size // settings.hosts
    print_notice(f"host {settings.host_rank} of {settings.hosts}: {size} rank(s) for {settings.name}")
    with private_folder() as folder, joined(settings, size) as (place, client):
        plan = partial(make_plan, config, devices.world_size, data.train_count, components.schedule)
        job = new_job(config, config_hash(config), components, devices, plan(None), data, folder, started)
        job = greeted(client, replace(job, place=place), settings.timeout, plan)
        ipc_dir = folder / "ranks"
        ipc_dir.mkdir(mode=0o700)
        launcher.run_ranks_of_host(run_rank, job, ipc_dir, client)
