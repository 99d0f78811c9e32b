"""Presets of training."""
