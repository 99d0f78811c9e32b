"""The items of one block of threads of a Hopper GPU, one after the other, with the copies of later steps under way.

A ring of steps lies in shared memory. Before a step is multiplied, the copies begin of the step that takes the place of
the one before it; they may be the next item's. What the copies of an item need to know from the GPU's memory, its group
and, where all steps have the same, its pages, is read with its first step, so that other steps do not wait for it; the
item's products read it once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from dynamo_jax.kernels.gpu_jobs import Down, Inner, Item


def run_items(job: Inner | Down, activation: Callable[[Array, Array], Array]) -> None:
    """All items of one block of threads, with the copies of later steps under way."""
    blocks, steps, stages = job.shape.blocks, job.steps, job.stages
    own = jax.lax.axis_index("block")
    items = jax.lax.div(jnp.maximum(job.inputs.work[0] * job.per_tile - own + blocks - 1, 0), blocks)
    all_steps = items * steps

    def issue(number: Any, ahead: Item) -> Item:
        """The copies of a step, if there are so many; ``ahead``: the item of the step before, and then of this one."""
        there, step = number < all_steps, jax.lax.rem(number, steps)
        of_step = own + jax.lax.div(number, steps) * blocks
        ahead = jax.lax.cond(there & (step == 0), lambda: job.item(of_step), lambda: ahead)

        @pl.when(there)
        def _issue() -> None:
            job.issue(ahead, step, jax.lax.rem(number, stages))

        return ahead

    job.start()
    ahead = jax.tree.map(lambda _: jnp.int32(0), jax.eval_shape(lambda: job.item(own)))
    for number in range(stages - 1):
        ahead = issue(jnp.int32(number), ahead)

    def one_item(index: Any, ahead: Item) -> Item:
        def over_steps(run: Callable[..., Any], init: tuple, ahead: Item) -> Any:
            def step(k: Any, carry: tuple) -> tuple:
                carry, ahead = carry
                number = index * steps + k
                ring = jax.lax.rem(number, stages)
                plgpu.barrier_wait(job.staged.barrier.at[ring])
                ahead = issue(number + stages - 1, ahead)  # over the step before, which all threads are done with
                return run(k, ring, carry), ahead

            return jax.lax.fori_loop(0, steps, step, (init, ahead))

        return job.run(job.item(own + index * blocks), over_steps, activation, ahead)

    jax.lax.fori_loop(0, items, one_item, ahead)
    plgpu.wait_smem_to_gmem(0)
