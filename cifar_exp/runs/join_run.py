"""One of the other hosts of a run: it runs ranks for host 0, and has no run folder, no tracker and no display."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from cifar_exp.config.reading import read_config
from cifar_exp.config.schema import Config
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.data.validation_split import hold_out
from cifar_exp.errors import CifarExpError, ConfigError
from cifar_exp.launch.devices import DeviceSet, find_devices
from cifar_exp.launch.elastic import ElasticLauncher
from cifar_exp.launch.host_link import HostLink
from cifar_exp.launch.host_words import overrides_here, plain_overrides
from cifar_exp.launch.host_zero import facts
from cifar_exp.launch.other_host import Round, joined, plan_of, with_news
from cifar_exp.runs.components import Components
from cifar_exp.runs.config_changes import config_hash, result_settings
from cifar_exp.runs.plan_job import new_job
from cifar_exp.runs.train_composed import build_components
from cifar_exp.system.accelerator import check_precision
from cifar_exp.system.printable import print_notice
from cifar_exp.system.temp_folder import private_folder
from cifar_exp.worker.train_job import run_rank


@dataclass(frozen=True)
class Prepared:
    """What this host has built and read for a job. The next job of a sweep often has the same images."""

    config: Config
    components: Components
    launcher: ElasticLauncher
    data: DatasetFiles


def join_run(typed: Sequence[str], compose: Callable[[Sequence[str]], DictConfig]) -> int:
    """Take part in all runs of host 0's command. Returns the exit code of that command.

    Args:
        typed: the overrides of this host's command.
        compose: composes a configuration from overrides.

    Raises:
        CifarExpError: a setting is wrong, or host 0 cannot be reached.
        Stopped: a signal stopped this host.
    """
    plain = plain_overrides(typed)
    prepared = _prepared(read_config(compose(plain)))
    settings = prepared.launcher.host_settings(are_hosts_known=len(plain) == len(typed))
    with joined(settings) as connection:
        print_notice(f"host {settings.host_rank}: connected to host 0 at {settings.name}")
        while current := connection.next_round():
            try:
                config = read_config(compose(overrides_here(typed, current.overrides)))
                if config != prepared.config:
                    prepared = _prepared(config)
                devices = _devices(prepared, current)
            except CifarExpError as error:
                current.refuse(error)
                print_notice(error)
                current.leave()
                continue
            _take_part(prepared, devices, current, settings.host_rank)
        return connection.exit_code


def _prepared(config: Config) -> Prepared:
    components = build_components(config)
    if not isinstance(components.launcher, ElasticLauncher):
        raise ConfigError(f"launcher: {config.launcher['_target_']} knows no other hosts. Set launcher=elastic")
    return Prepared(config, components, components.launcher, hold_out(components.dataset(), config.validation))


def _devices(prepared: Prepared, current: Round) -> DeviceSet:
    """The devices of this host for its share of the ranks."""
    devices = find_devices(replace(prepared.config.devices, count=current.place.local_size))
    check_precision(prepared.config.train.precision, devices.accelerator)
    return devices


def _take_part(prepared: Prepared, devices: DeviceSet, current: Round, host: int) -> None:
    """Run this host's ranks of one round, and report how they ended. Host 0 decides what follows."""
    config, data = prepared.config, prepared.data
    current.report(facts(result_settings(config), data.content_hash, devices.accelerator))
    try:
        news = current.wait_for_job()
        with private_folder() as folder:
            job = new_job(
                config,
                config_hash(config),
                prepared.components,
                devices,
                plan_of(news),
                data,
                folder,
                time.monotonic(),
            )
            job = with_news(replace(job, place=current.place), news, current.store)
            ipc_dir = folder / "ranks"
            ipc_dir.mkdir(mode=0o700)
            link = HostLink(current.place, host, current.store, ipc_dir)
            prepared.launcher.run_ranks_of_host(run_rank, job, link)
    except CifarExpError as error:
        print_notice(error)
    current.leave()
