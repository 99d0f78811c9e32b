"""What quantized experts change on text: loss, divergence, and what switching wins back."""
