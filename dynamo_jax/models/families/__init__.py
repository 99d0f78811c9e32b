"""What a family of models means by its config.json, and what it calls its tensors; a file for each lineage."""
