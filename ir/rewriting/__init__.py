"""The rewrite engine: patterns, matching, the worklist that applies rules, and the proof that two graphs are equal."""
