"""One run or one sweep in the parent process: plan, resume, start the ranks, report."""
