"""Streaming statistics and significance."""
