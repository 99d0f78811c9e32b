"""Plans, their bytes, and allocation."""
