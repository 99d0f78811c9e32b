"""From text to planes: sweeps over a model's layers, what each dataset needs, the baseline plan."""
