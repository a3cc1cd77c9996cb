"""The torch backend: a graph as source that its owner would be glad to read, and what that source calls."""
