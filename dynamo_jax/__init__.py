"""Dynamic expert-level mixed precision for mixture-of-experts language models in JAX.

All names that a user needs are here, and stay here; modules below may move. A name's module is imported when the
name is first asked for, so that ``import dynamo_jax`` is quick and touches no device.

    analyze, analyze_folder, Analysis           which experts and channels matter, on several datasets
    plan, Plan                                  their widths under a byte budget
    quantize, quantize_folder, QuantizeConfig   both, and the quantized model
    load, save, export, QuantizedModel          quantized models in files
    load_decoder, load_tokenizer, BUNDLED       unquantized models from files ..
    Decoder, ModelConfig, with_parameters       .. and in memory
    load_text_model, text_model, TextModel      a model that continues text ..
    generate, stream, GenerateConfig            .. and its continuations
    evaluate, EvalConfig, Row, Adaptation       what quantization and switching change on texts ..
    divergence, Divergence                      .. and how far predictions are from the original's
    evaluate_tasks, TaskRow                     accuracy on zero-shot tasks ..
    read_task, Document                         .. of a file
    init, experts, observe, switch, renew, follow, is_novel, adapt, begin, finish, whole, State, Host, Move, Follower
                                                the run time, for a jitted step of your own (docs/serving.md)
    Placement                                   of it on several devices (docs/scale.md)
    all_hosts                                   the processes that calibrate together (docs/scale.md)
    Experts, ExpertsRule, with_experts          experts of a Flax NNX model of your own; the method for it is in the
                                                module dynamo_jax.transform (docs/transform.md)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dynamo_jax.calibration.analyses import Analysis
    from dynamo_jax.calibration.config import QuantizeConfig
    from dynamo_jax.calibration.pipeline import analyze, analyze_folder, quantize, quantize_folder
    from dynamo_jax.calibration.plans import plan
    from dynamo_jax.evaluation.divergence import Divergence, divergence
    from dynamo_jax.evaluation.evaluate import evaluate, evaluate_tasks
    from dynamo_jax.evaluation.perplexity import EvalConfig, Row
    from dynamo_jax.evaluation.switched import Adaptation
    from dynamo_jax.evaluation.tasks import TaskRow
    from dynamo_jax.generation import TextModel, generate, load_text_model, stream, text_model
    from dynamo_jax.models.bundled import BUNDLED
    from dynamo_jax.models.config import ModelConfig
    from dynamo_jax.models.decoder import Decoder, with_parameters
    from dynamo_jax.models.huggingface import load_decoder
    from dynamo_jax.models.tokenizer import load_tokenizer
    from dynamo_jax.precision.plan import Plan
    from dynamo_jax.runtime.generate import GenerateConfig
    from dynamo_jax.runtime.hosts import all_hosts
    from dynamo_jax.runtime.mesh import Placement
    from dynamo_jax.runtime.online import Follower
    from dynamo_jax.runtime.quantized import QuantizedModel
    from dynamo_jax.runtime.serving import (
        Host,
        Move,
        State,
        adapt,
        begin,
        experts,
        finish,
        follow,
        init,
        is_novel,
        observe,
        renew,
        switch,
        whole,
    )
    from dynamo_jax.storage.checkpoint import load, save
    from dynamo_jax.storage.export import export
    from dynamo_jax.texts.tasks import Document, read_task
    from dynamo_jax.transform import Experts, ExpertsRule, with_experts

__all__ = [
    "BUNDLED",
    "Adaptation",
    "Analysis",
    "Decoder",
    "Divergence",
    "Document",
    "EvalConfig",
    "Experts",
    "ExpertsRule",
    "Follower",
    "GenerateConfig",
    "Host",
    "ModelConfig",
    "Move",
    "Placement",
    "Plan",
    "QuantizeConfig",
    "QuantizedModel",
    "Row",
    "State",
    "TaskRow",
    "TextModel",
    "adapt",
    "all_hosts",
    "analyze",
    "analyze_folder",
    "begin",
    "divergence",
    "evaluate",
    "evaluate_tasks",
    "experts",
    "export",
    "finish",
    "follow",
    "generate",
    "init",
    "is_novel",
    "load",
    "load_decoder",
    "load_text_model",
    "load_tokenizer",
    "observe",
    "plan",
    "quantize",
    "quantize_folder",
    "read_task",
    "renew",
    "save",
    "stream",
    "switch",
    "text_model",
    "whole",
    "with_experts",
    "with_parameters",
]

_MODULES = {
    "calibration.analyses": ("Analysis",),
    "calibration.config": ("QuantizeConfig",),
    "calibration.pipeline": ("analyze", "analyze_folder", "quantize", "quantize_folder"),
    "calibration.plans": ("plan",),
    "evaluation.divergence": ("Divergence", "divergence"),
    "evaluation.evaluate": ("evaluate", "evaluate_tasks"),
    "evaluation.perplexity": ("EvalConfig", "Row"),
    "evaluation.switched": ("Adaptation",),
    "evaluation.tasks": ("TaskRow",),
    "generation": ("TextModel", "generate", "load_text_model", "stream", "text_model"),
    "models.bundled": ("BUNDLED",),
    "models.config": ("ModelConfig",),
    "models.decoder": ("Decoder", "with_parameters"),
    "models.huggingface": ("load_decoder",),
    "models.tokenizer": ("load_tokenizer",),
    "precision.plan": ("Plan",),
    "runtime.generate": ("GenerateConfig",),
    "runtime.hosts": ("all_hosts",),
    "runtime.mesh": ("Placement",),
    "runtime.online": ("Follower",),
    "runtime.quantized": ("QuantizedModel",),
    "runtime.serving": (
        *(
            "Host",
            "Move",
            "State",
            "adapt",
            "begin",
            "experts",
            "finish",
            "follow",
            "init",
            "is_novel",
            "observe",
            "renew",
            "switch",
            "whole",
        ),
    ),
    "storage.checkpoint": ("load", "save"),
    "storage.export": ("export",),
    "texts.tasks": ("Document", "read_task"),
    "transform": ("Experts", "ExpertsRule", "with_experts"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dynamo_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dynamo_jax.{_HOME[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
