"""Passes that reorder nodes, or compute some of them twice, so that a run needs less memory."""
