"""Cutting units out for good: the cut, its proof, following a recipe, and reloading."""
