"""Sharing weights between parts of a network: repeated blocks tied or made of the same atoms."""
