"""The bundled model: its weights, its card and the recipe that makes it."""
