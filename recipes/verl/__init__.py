"""Recipes on verl: `python -m recipes.verl RECIPE`."""
