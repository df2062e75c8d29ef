"""One run in the parent process: plan, resume, start the ranks, report."""
