"""What `bench` and `verify` ask of a model: suites of prompts, a plan over them, and tasks with their answers."""
