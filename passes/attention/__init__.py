"""Attention as sites: what projects into an attention node and out of it, and what stands between."""
