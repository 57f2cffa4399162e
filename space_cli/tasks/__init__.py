"""What `bench` and `verify` run: suites of prompts, a plan over them, and tasks."""
