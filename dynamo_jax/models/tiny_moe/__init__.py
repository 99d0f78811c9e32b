"""The bundled model's files: an ordinary Hugging Face checkpoint and its model card."""
