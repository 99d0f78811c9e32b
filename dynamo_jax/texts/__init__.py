"""Text in: files, documents, windows of tokens."""
