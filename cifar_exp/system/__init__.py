"""The operating system: files, locks, signals, processes, the machine and its load."""
