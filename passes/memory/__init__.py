"""When what is computed, and what is computed twice, so that less memory is needed."""
