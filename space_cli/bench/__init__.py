"""Paired measurement: suites of prompts, methods that answer them, and what comes out of a run."""
