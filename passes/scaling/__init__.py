"""Scales beside data: the whole graph as pairs of both."""
