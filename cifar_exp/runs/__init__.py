"""The parent process's side of one run and of a sweep: prepare, resume, execute, conclude."""
