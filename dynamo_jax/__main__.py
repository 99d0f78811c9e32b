"""``python -m dynamo_jax``: the command line."""

from dynamo_jax.commands.app import script

script()
