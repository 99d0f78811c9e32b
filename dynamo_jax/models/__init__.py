"""The decoder, its configuration and checkpoints."""
