"""Files and tensors, below the families: safetensors folders, and how expert weights lie in them."""
