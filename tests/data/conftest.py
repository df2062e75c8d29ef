"""The server of a small release, for the tests of this folder."""

from tests.helpers.cifar10_release import server  # noqa: F401
