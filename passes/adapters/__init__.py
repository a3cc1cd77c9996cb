"""Small trainable parts beside frozen weights, and their way back into these."""
