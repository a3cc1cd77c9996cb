"""Other ways to compute sums of products of tensors."""
