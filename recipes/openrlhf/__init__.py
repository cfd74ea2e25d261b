"""Recipes on OpenRLHF: `python -m recipes.openrlhf RECIPE`."""
