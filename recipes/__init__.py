"""Recipes: one run configuration a file."""
