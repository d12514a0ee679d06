"""One run and many: the task loop, the folder of a run, its checkpoints, sweeps and estimates."""
