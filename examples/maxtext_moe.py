"""A rule for MaxText's ``RoutedMoE``: a tuple of outputs, a loss of the router, experts that may be forced.

    python3.12 -m venv .venv-maxtext && .venv-maxtext/bin/pip install .
    .venv-maxtext/bin/pip install --no-deps maxtext==0.2.5 aqtp tokamax
    .venv-maxtext/bin/pip install qwix omegaconf pydantic psutil packaging pathwaysutils fastapi uvicorn requests \
        drjax grain pillow transformers einshape immutabledict tensorboardx tqdm
    .venv-maxtext/bin/python examples/maxtext_moe.py

One layer with random weights is taken by the rule, which must not change what it returns, then rounded. MaxText's bias
updates, its dropping of tokens and its cast of the inputs are left out of the rule.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax import transform as djt

for _name in ("xprof", "xprof.cli", "xprof.cli.tools"):  # a profiler's, which tokamax imports and nothing here needs
    sys.modules[_name] = types.ModuleType(_name)
sys.modules["xprof.cli.tools"].get_kernel_stats_tool = None  # type: ignore[attr-defined]

try:
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.layers import moe
    from maxtext.layers.initializers import nd_dense_init
    from maxtext.utils import maxtext_utils
except ImportError as error:
    raise SystemExit(f"{error}: see the docstring of this file") from error


def layer(
    m: Any, experts: Any, x: Any, input_ids: Any = None, gate_inputs: Any = None, out_sharding: Any = None,
    forced_routed_experts: Any = None,
) -> Any:  # fmt: skip
    logits, before_bias = m.gate(x if gate_inputs is None else gate_inputs)
    gates, ids = m.get_topk(logits, before_bias, m.rngs, input_ids, forced_routed_experts)
    balances = m.config.load_balance_loss_weight > 0
    loss = m.load_balance_loss(ids, jax.nn.softmax(logits, axis=-1)) if balances else None
    return experts(x, ids, gates), loss, None


def rule(config: Any) -> djt.ExpertsRule:
    act = moe.linears._convert_to_activation_function(config.mlp_activations[0])
    return djt.ExpertsRule(
        moe.RoutedMoE,
        experts=lambda m: djt.Experts(m.wi_0, m.wi_1, m.wo, activation=lambda g, u: act(g) * u),
        call=layer,
    )


def main() -> None:
    config = pyconfig.initialize(
        [None, maxtext.__path__[0] + "/configs/base.yml"], run_name="x", enable_checkpointing=False, log_config=False,
        base_emb_dim=64, base_mlp_dim=32, base_moe_mlp_dim=32, base_num_decoder_layers=2, num_experts=16,
        num_experts_per_tok=4, decoder_block="qwen3_moe", norm_topk_prob=True, max_target_length=24,
        per_device_batch_size=2, dtype="float32", weight_dtype="float32", matmul_precision="highest", hardware="cpu",
        skip_jax_distributed_system=True, sparse_matmul=False, capacity_factor=-1.0, load_balance_loss_weight=0.01,
    )  # fmt: skip
    mesh = Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = moe.RoutedMoE(
        config, num_experts=16, num_experts_per_tok=4, mesh=mesh, rngs=nnx.Rngs(0), intermediate_dim=32,
        kernel_init=nd_dense_init(1.0, "fan_in", "truncated_normal"), kernel_axes=("embed", None), dtype=jnp.float32,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (2, 24, 64))
    (want, loss, _), taken = model(x), djt.with_experts(model, [rule(config)], x)
    print(f"balance loss {float(loss):.6f}, by the rule {float(taken(x)[1]):.6f}")
    for name, other in [("float", taken)] + [
        (f"{w} bits", djt.quantize(taken, djt.uniform(taken, w))[0]) for w in (8, 4, 2)
    ]:
        print(f"{name:8} relative error {float(jnp.linalg.norm(other(x)[0] - want) / jnp.linalg.norm(want)):.6f}")


if __name__ == "__main__":
    main()
