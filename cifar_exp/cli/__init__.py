"""The command line: one file a subcommand, and Hydra behind `train`."""
