"""What passes learn from data: the batches, the layers whose inputs are looked at, and sums over these inputs."""
