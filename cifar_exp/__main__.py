import sys

from cifar_exp.cli.entry import train

sys.exit(train())
