"""Which entries of the backbone's own tensors train, and nothing else."""
