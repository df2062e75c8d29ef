"""One run or one sweep in the parent process: prepare, resume, execute, conclude."""
