"""Paired measurement: methods that answer the same prompts, and the records of a run."""
