"""Requirements of some tests on the machine."""

import os
import sys

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: it reads or takes away what Linux alone has")
pinning = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="NOT RUN: no process can be kept to cores")
