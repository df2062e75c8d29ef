"""From devices to ranks: find devices, start a process for each rank, and watch the ranks."""
