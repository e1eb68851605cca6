"""Running an experiment: its runs, the training loop, checkpoints, devices and plans."""
