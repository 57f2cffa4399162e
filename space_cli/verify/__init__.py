"""Is the output the same? Equivalence checks, and the anatomy of every divergence."""
