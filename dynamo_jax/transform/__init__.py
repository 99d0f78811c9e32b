"""The whole method for a Flax NNX model that is not ours: docs/transform.md.

model = with_experts(model, [rule], *example)            or Experts called in the model's own code
analysis = analyze(model, {name: batches}, loss)         significance, dynamics, planes
model, host = quantize(model, plan(analysis, bits=3.0), analysis, requests=8)
observe, follow, switch                                  inside the caller's jit
adapt(model, host, batches, forward)                     between two steps
save(folder, model, host); model, host = load(folder, abstract_model)
"""

from dynamo_jax.calibration.config import QuantizeConfig
from dynamo_jax.transform.analysis import ModelAnalysis, Significance, analyze
from dynamo_jax.transform.experts import Experts
from dynamo_jax.transform.plans import ModelPlan, plan, uniform
from dynamo_jax.transform.rules import ExpertsRule, with_experts
from dynamo_jax.transform.saved import load, save
from dynamo_jax.transform.served import LayerNumber, Plane
from dynamo_jax.transform.serving import (
    ModelHost,
    adapt,
    follow,
    for_requests,
    is_novel,
    labels,
    observe,
    quantize,
    switch,
    take,
)

__all__ = [
    "Experts",
    "ExpertsRule",
    "LayerNumber",
    "ModelAnalysis",
    "ModelHost",
    "ModelPlan",
    "Plane",
    "QuantizeConfig",
    "Significance",
    "adapt",
    "analyze",
    "follow",
    "for_requests",
    "is_novel",
    "labels",
    "load",
    "observe",
    "plan",
    "quantize",
    "save",
    "switch",
    "take",
    "uniform",
    "with_experts",
]
