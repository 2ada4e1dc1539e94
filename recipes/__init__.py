"""Recipes: configuration only. Run one with `python -m recipes.NAME`."""
