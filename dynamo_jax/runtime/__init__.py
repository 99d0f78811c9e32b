"""Variants, switching, the shift monitor and adaptation."""
