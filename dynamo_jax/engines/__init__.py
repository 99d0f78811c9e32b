"""Serving engines of others that run our models: one module an engine, which holds every name of it that we use."""
