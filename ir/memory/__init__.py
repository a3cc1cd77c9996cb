"""What a run of a graph holds in memory, and tensors that lie in files until they are read."""
