"""What is known before a graph runs, and what may be computed early."""
