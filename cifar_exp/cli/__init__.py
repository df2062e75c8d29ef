"""The command line: one file per subcommand, and Hydra behind `train`."""
