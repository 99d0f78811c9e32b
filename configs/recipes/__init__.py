"""Recipes: named runs of `dynamo-jax bench`."""
