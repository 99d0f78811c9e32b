"""``python -m dynamo_jax``: the command line."""

from dynamo_jax.cli import main

main()
