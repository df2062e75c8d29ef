"""A process that has imported what ranks need and does nothing but fork them.

Importing torch costs a rank three seconds and its optimizers four more (they import the compiler). The nursery, which
is Python's fork server, does both while the parent reads its configuration; ranks are forked from it in milliseconds,
as are those of a sweep's later jobs. It has one thread and no CUDA context, so forking it is safe.
"""

import multiprocessing.forkserver as forkserver

MODULES = ["cifar_exp.worker", "torch._dynamo"]
START_METHOD = "forkserver"


def warm_up() -> None:
    """Start the nursery, once a process; it ends with its parent."""
    forkserver.set_forkserver_preload(MODULES)
    forkserver.ensure_running()
