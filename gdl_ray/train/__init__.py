"""The training loop, its checkpoints and its data parallelism; `worker` runs it under Ray Train."""
