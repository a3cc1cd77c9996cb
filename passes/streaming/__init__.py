"""Networks over time as graphs that take a few frames at a time and carry what they need of earlier ones."""
