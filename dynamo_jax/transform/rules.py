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
        if name.startswith(("__", "_pytree", "_object")) or "inner" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in ("inner", "experts", "call") or name.startswith("_") or "inner" not in vars(self)
        super().__setattr__(name, value) if own else setattr(self.inner, name, value)


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
    """A copy of ``model`` in which the modules that a rule names use ``Experts``; arrays are not copied.

    args, kwargs: an example that both are called with, ``model(*args, **kwargs)``. They must return the same but for
    rounding; so must each module that was replaced. An abstract model (``nnx.eval_shape``) is not compared.
    ValueError, which names the module and the difference: they do not, no module matches a rule, or one lies in another
    that does, too.
    """
    found = _matching(model, rules)
    swapped = nnx.clone(model)
    own = dict(nnx.iter_modules(swapped))
    made: list[Ruled] = []
    for path, rule in found.items():
        inner = own[path]
        experts = rule.experts(inner)
        if not isinstance(experts, Experts):
            raise ValueError(f"{dotted(path)}: the rule's experts are {type(experts).__name__}, expected Experts")
        left = {id(v) for v in experts.weight_variables()}
        for _, module in nnx.iter_modules(inner):
            for name in [n for n, v in vars(module).items() if id(v) in left]:
                left.discard(id(getattr(module, name)))
                delattr(module, name)
        if left:
            raise ValueError(
                f"{dotted(path)}: the rule's Experts hold weights that are no Params of the module, which would keep "
                "its own: give them the Params themselves (m.w, not m.w[...]) and say their layout"
            )
        made.append(Ruled(inner, experts, rule.call))
    result: Any = swapped
    for ruled in made:
        result = _put_for(result, ruled.inner, ruled)
    if not any(isinstance(a, (jax.core.Tracer, jax.ShapeDtypeStruct)) for a in jax.tree.leaves(nnx.state(model))):
        _compare(model, result, found, args, kwargs)
    return result


def _put_for(model: Any, old: nnx.Module, new: nnx.Module) -> Any:
    """The model with ``new`` wherever ``old`` is."""
    if model is old:
        return new
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if value is old and module is not new:
                setattr(module, name, new)
        if isinstance(module, nnx.List):
            for index, value in enumerate(module):
                if value is old:
                    module[index] = new
        if isinstance(module, nnx.Dict):
            for name, value in module.items():
                if value is old:
                    module[name] = new
    return model


def _matching(model: nnx.Module, rules: Sequence[ExpertsRule]) -> dict[tuple[Any, ...], ExpertsRule]:
    found: dict[tuple[Any, ...], ExpertsRule] = {}
    for path, module in nnx.iter_modules(model):
        rule = next((r for r in rules if r.matches(path, module)), None)
        if rule is not None:
            found[path] = rule
    for path in found:
        outer = next((p for p in found if p != path and path[: len(p)] == p), None)
        if outer is not None:
            raise ValueError(f"{dotted(path)}: it lies in {dotted(outer)}, which matches a rule, too")
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
        listened = _put_for(listened, own[path], _Heard(own[path], heard[path].append))
    want = listened(*args, **kwargs)
    alone = nnx.clone(result)  # which calls may change: caches, counters of dropout
    ruled = {path: module for path, module in nnx.iter_modules(alone) if isinstance(module, Ruled)}
    for path, calls in heard.items():
        for given, named, out in calls[:1]:  # later ones begin at another state
            if not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((given, named, out))):
                _agree(dotted(path), out, ruled[path](*given, **named), _rough(ruled[path], given))
    _agree("the model", want, nnx.clone(result)(*args, **kwargs), _rough(result, args))


def _rough(module: nnx.Module, given: Any) -> bool:
    """Whether anything there is of 16 bits."""
    arrays = jax.tree.leaves((nnx.state(module), given))
    return any(getattr(a, "dtype", None) in (jnp.bfloat16, jnp.float16) for a in arrays)


def _agree(what: str, want: Any, got: Any, rough: bool) -> None:
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
        allowed = ROUGH if rough else EXACT
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(x)), 1e-30)
        if not error <= allowed:
            where = f", output {index}" if len(wanted) > 1 else ""
            raise ValueError(
                f"{what}{where}: with Experts the outputs differ by {error:.3g} of their size, at most {allowed:g} is "
                "rounding; does the rule's call do all that the module's own does?"
            )
