"""Grouped matmul over the experts of a mixture-of-experts layer: a reference and fast paths.

Imported as ``dynamo_jax.kernels``, never as ``kernels``.
"""
