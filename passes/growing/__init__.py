"""Wider networks from trained ones that compute the same, and narrower ones that stand for two indices by one."""
