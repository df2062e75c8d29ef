"""Runs over several hosts, which are namespaces of this machine."""
