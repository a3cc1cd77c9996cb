"""Which values of a graph may be scaled, what an operator does with scales, and the variables these share."""
