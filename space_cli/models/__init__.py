"""Models by name: the registry of aliases, loading from folder or Hub, SPACE checkpoints, refusals."""
