"""Classes of somebody else: ``Experts`` put where their experts are, without an edit of the model's code.

rule = ExpertsRule(
    MoELayer,
    experts=lambda m: Experts(m.gate_proj, m.up_proj, m.down_proj),
    call=lambda m, experts, x: experts(x, *top_k(m.router(x), m.experts_per_tok)),
)
model = with_experts(model, [rule], tokens)    # the same outputs, or an error that names the module
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynamo_jax.transform.experts import Experts
from dynamo_jax.transform.found import dotted

M = TypeVar("M", bound=nnx.Module)

EXACT, ROUGH = 1e-3, 2e-2  # relative differences that float32 and 16-bit arithmetic may make


@dataclasses.dataclass(frozen=True)
class ExpertsRule:
    """How modules of one kind use their experts.

    where: their type, or a regular expression that their dotted path matches as a whole. experts: of a module the
    ``Experts`` that are made of its Params, in whatever layout they lie. call: (module, experts, *args, **kwargs) ->
    what the module's own ``__call__`` returns, ``experts(x, ids, gates)`` standing for its experts; routing, shared
    experts, losses and tuples are the call's. Calls may use the module's Params other than its experts', its attributes
    and methods.
    """

    where: type | str
    experts: Callable[[Any], Experts]
    call: Callable[..., Any]

    def matches(self, path: tuple[Any, ...], module: nnx.Module) -> bool:
        if isinstance(self.where, str):
            return re.fullmatch(self.where, ".".join(map(str, path))) is not None
        return isinstance(module, self.where)


class Ruled(nnx.Module):
    """A module whose experts are ``Experts`` now. Everything else is still ``inner``'s, and found here, too."""

    def __init__(self, inner: nnx.Module, experts: Experts, call: Callable[..., Any]):
        self.inner, self.experts, self.call = inner, experts, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.inner, self.experts, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Heard(nnx.Module):
    """A module of the user's that remembers what it was called with and what it returned."""

    def __init__(self, inner: nnx.Module, calls: Callable[[tuple[Any, dict[str, Any], Any]], None]):
        self.inner, self.calls = inner, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        self.calls((args, kwargs, out))
        return out

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(self.inner, name)


def with_experts(model: M, rules: Sequence[ExpertsRule], *args: Any, **kwargs: Any) -> M:
    """A copy of ``model`` in which the modules that a rule names use ``Experts``; its Params are shared with ``model``.

    args, kwargs: an example that both are called with, ``model(*args, **kwargs)``. They must return the same but for
    rounding; so must each module that was replaced. ValueError, which names the module and the difference: they do not,
    or no module matches a rule.
    """
    found = _matching(model, rules)
    swapped = nnx.clone(model)
    own = dict(nnx.iter_modules(swapped))
    paths: list[tuple[tuple[Any, ...], nnx.Module]] = []
    for path, rule in found.items():
        inner = own[path]
        experts = rule.experts(inner)
        if not isinstance(experts, Experts):
            raise ValueError(f"{dotted(path)}: the rule's experts are {type(experts).__name__}, expected Experts")
        taken = {id(v) for v in vars(experts).values() if isinstance(v, nnx.Variable)}
        for name in [n for n, v in vars(inner).items() if id(v) in taken]:
            delattr(inner, name)
        paths.append((path, Ruled(inner, experts, rule.call)))
    result: Any = swapped
    for path, ruled in paths:
        result = replaced(result, path, ruled)
    _compare(model, result, found, args, kwargs)
    return result


def _matching(model: nnx.Module, rules: Sequence[ExpertsRule]) -> dict[tuple[Any, ...], ExpertsRule]:
    found: dict[tuple[Any, ...], ExpertsRule] = {}
    for path, module in nnx.iter_modules(model):
        rule = next((r for r in rules if r.matches(path, module)), None)
        if rule is not None:
            found[path] = rule
    for rule in rules:
        if rule not in found.values():
            what = repr(rule.where) if isinstance(rule.where, str) else rule.where.__name__
            kinds = sorted({type(m).__name__ for _, m in nnx.iter_modules(model)})
            raise ValueError(f"no module of the model matches the rule for {what}; it has {', '.join(kinds)}")
    return found


def _compare(
    model: Any, result: Any, found: dict[tuple[Any, ...], ExpertsRule], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """First each replaced module on what it is given in the user's model, then the whole models."""
    heard: dict[tuple[Any, ...], list[Any]] = {path: [] for path in found}
    listened: Any = nnx.clone(model)
    own = dict(nnx.iter_modules(listened))
    for path in found:
        listened = replaced(listened, path, _Heard(own[path], heard[path].append))
    want = listened(*args, **kwargs)
    ruled = {path: module for path, module in nnx.iter_modules(result) if isinstance(module, Ruled)}
    for path, calls in heard.items():
        for given, named, out in calls:
            if not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((given, named, out))):
                _agree(dotted(path), out, ruled[path](*given, **named))
    _agree("the model", want, result(*args, **kwargs))


def _agree(what: str, want: Any, got: Any) -> None:
    wanted, gotten = jax.tree.leaves(want), jax.tree.leaves(got)
    tree: Any = jax.tree.structure(want)
    other: Any = jax.tree.structure(got)
    if tree != other:
        raise ValueError(f"{what}: with Experts it returns {other}, without {tree}")
    for index, (a, b) in enumerate(zip(wanted, gotten)):
        if not hasattr(a, "dtype"):
            continue
        if a.shape != b.shape:
            raise ValueError(f"{what}: with Experts it returns {b.shape}, without {a.shape}")
        allowed = EXACT if a.dtype in (jnp.float32, jnp.float64) else ROUGH
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(x)), 1e-30)
        if not error <= allowed:
            where = f", output {index}" if len(wanted) > 1 else ""
            raise ValueError(
                f"{what}{where}: with Experts the outputs differ by {error:.3g} of their size, at most {allowed:g} is "
                "rounding; does the rule's call do all that the module's own does?"
            )


def replaced(model: Any, path: tuple[Any, ...], module: nnx.Module) -> Any:
    """The model with ``module`` at ``path``."""
    if not path:
        return module
    parent = model
    for part in path[:-1]:
        parent = parent[part] if isinstance(part, int) or isinstance(parent, dict) else getattr(parent, part)
    if isinstance(path[-1], int) or isinstance(parent, dict):
        parent[path[-1]] = module
    else:
        setattr(parent, path[-1], module)
    return model
