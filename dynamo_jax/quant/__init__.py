"""Quantization of plain arrays: rounding, nested planes, packing."""
