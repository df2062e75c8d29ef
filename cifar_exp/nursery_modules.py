"""What the nursery imports, the only thing that Python's fork server can be told: hence a side effect."""

import signal

from cifar_exp.nursery import end_with_parent

# Before the imports, which take seconds: Ctrl-C is the parent's to answer.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
end_with_parent()

import torch._dynamo  # noqa: E402, F401

import cifar_exp.worker  # noqa: E402, F401
