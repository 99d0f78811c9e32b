"""What lies on disk: unfinished work, quantized checkpoints, exported folders."""
