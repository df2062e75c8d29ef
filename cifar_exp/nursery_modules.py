"""What the nursery imports, the only thing that Python's fork server can be told: hence a side effect."""

from cifar_exp.nursery import end_with_parent

end_with_parent()  # before the imports, which take seconds

import torch._dynamo  # noqa: E402, F401

import cifar_exp.worker  # noqa: E402, F401
