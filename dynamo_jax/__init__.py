"""Dynamic expert-level mixed precision for mixture-of-experts language models in JAX."""

from typing import Any

__version__ = "0.1.0"
_FROM_TRANSFORM = ("quantize_model", "switch_model", "uniform_plan")


def __getattr__(name: str) -> Any:
    """The transform of NNX models, imported when it is first asked for: the command line starts without it."""
    if name in _FROM_TRANSFORM:
        from dynamo_jax import transform

        return getattr(transform, name)
    raise AttributeError(f"module 'dynamo_jax' has no attribute {name!r}")
