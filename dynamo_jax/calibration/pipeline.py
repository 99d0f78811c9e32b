"""Text to a quantized model: calibrate on the known datasets, allocate, quantize.

``sweeps.py`` does the long part; this module turns text into its windows and its sums into a plan.
A model in memory becomes a ``QuantizedModel``; a checkpoint folder, of any size, becomes a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Float, Int

from dynamo_jax.analysis.statistics import Statistics
from dynamo_jax.calibration.analyses import Analysis, known_windows, whole
from dynamo_jax.calibration.config import DRAWING_BYTES, UNSEEN, QuantizeConfig, check_shapes, settled
from dynamo_jax.calibration.knowledge import knowledge_of
from dynamo_jax.calibration.plans import favoured, plan
from dynamo_jax.calibration.sweeps import Calibration, Draft, calibrate, statistics_of
from dynamo_jax.calibration.unseen import CALIBRATION, distil_windows, drawn_windows, given_to_distil, with_unseen
from dynamo_jax.models.decoder import Decoder, parameters, without_experts
from dynamo_jax.models.huggingface import Source, load_decoder, side_files, side_files_of
from dynamo_jax.models.rest import quantized as with_quantized_rest
from dynamo_jax.models.sources import DecoderSource, LayerSource, with_rest
from dynamo_jax.models.tokenizer import load_tokenizer
from dynamo_jax.precision.plan import Plan
from dynamo_jax.progress import Log, Progress, no_log, no_progress
from dynamo_jax.quant.planes import Planes
from dynamo_jax.runtime.hosts import ALONE, Hosts
from dynamo_jax.runtime.quantized import Knowledge, QuantizedModel
from dynamo_jax.storage import checkpoint
from dynamo_jax.storage.bundles import layer_name, layer_planes, planes_bundle, stacked_planes
from dynamo_jax.storage.results import Making, is_done
from dynamo_jax.storage.work import FolderWork, MemoryWork, SharedWork, Work
from dynamo_jax.texts.reading import digest

if TYPE_CHECKING:
    from dynamo_jax.calibration.distil import Distilled

DISTILLED, DRAWN = "distilled", "drawn"
HOW_TO_DRAW = f"--unseen-windows makes it, --known {UNSEEN}=FILE gives it text, --novelty-weight 0 expects none"
WORK_FORMAT = 5  # of unfinished work: raised when bundles change their meaning
Found = Callable[[dict[str, Analysis]], None]


def no_analysis(found: dict[str, Analysis]) -> None:
    """Nobody wants to know."""


def analyze(
    model: Decoder,
    tokenizer: tokenizers.Tokenizer,
    known: dict[str, str],
    config: QuantizeConfig | None = None,
    progress: Progress = no_progress,
) -> dict[str, Analysis]:
    """What each known text (name -> text) says of a model in memory: routing, and the significance of its experts,
    channel blocks and channels, in nats a token; and, as the dataset ``unseen``, what text says that stands for what
    nobody has seen (``QuantizeConfig.unseen_windows``).

    Significance is measured on the planes that ``quantize`` would make with the same ``config``, so that ``plan`` can
    choose from it under any budget. progress: is called with (stage, done, of). ValueError: no text, a text of less
    than a window, settings that do not fit the model. Source: docs/design.md, "Formulas".
    """
    whole = Whole(lambda: model, 0)
    return _analyze_only(DecoderSource(model), whole, tokenizer, known, config or QuantizeConfig(), progress)


def analyze_folder(
    folder: str | Path,
    known: dict[str, str],
    config: QuantizeConfig | None = None,
    progress: Progress = no_progress,
    *,
    hosts: Hosts = ALONE,
) -> dict[str, Analysis]:
    """As ``analyze``, for a Hugging Face folder that memory need not hold.

    hosts: the processes that share the work out (``all_hosts()``), all of which call this and get the same.
    """
    config = config or QuantizeConfig()
    with hosts.together():
        source = Source(Path(folder))
        hosts.check_same(_given(source, known, config, side_files(source.folder)))
        tokenizer = load_tokenizer(source.folder)
        told = progress if hosts.first else no_progress
        return _analyze_only(source, _whole(source), tokenizer, known, config, told, hosts)


def _given(source: Source, known: dict[str, str], config: QuantizeConfig, files: dict[str, bytes]) -> dict[str, str]:
    """What the processes of one job must all be given, by words for it. Times of files are each host's own."""
    sizes = {name: size for name, (size, _) in source.fingerprint().items()}
    return {
        "settings": json.dumps(dataclasses.asdict(config)),
        "texts": json.dumps([[name, digest(text)] for name, text in known.items()]),
        "model": json.dumps([sizes, _digests(files)]),
    }


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _analyze_only(
    source: LayerSource,
    whole: Whole,
    tokenizer: tokenizers.Tokenizer,
    known: dict[str, str],
    config: QuantizeConfig,
    progress: Progress,
    hosts: Hosts = ALONE,
) -> dict[str, Analysis]:
    check_shapes(source.config, config)
    windows = known_windows(known, tokenizer, config, source.config.vocab_size)
    work = MemoryWork(unwanted=("layer-", "top"))
    windows = _and_unseen(whole, windows, config, work, progress, hosts)
    return analyze_layers(source, windows, config, work, progress, hosts)


class Whole(NamedTuple):
    """A model as text is drawn from it. bytes: that loading it takes, 0 if it is in memory."""

    load: Callable[[], Decoder]
    bytes: int


def _whole(source: Source) -> Whole:
    return Whole(lambda: load_decoder(source.folder), source.expert_bytes() + source.other_bytes())


def _and_unseen(
    whole: Whole,
    windows: dict[str, Int[np.ndarray, "S T1"]],
    config: QuantizeConfig,
    work: Work,
    progress: Progress,
    hosts: Hosts,
) -> dict[str, Int[np.ndarray, "S T1"]]:
    """The windows of calibration, and those that the model draws. Drawing them is a finished step of ``work``. Of
    several processes the first one draws them for all."""

    def draw(count: int) -> Int[np.ndarray, "S T1"]:
        def drawn() -> dict[str, np.ndarray]:
            if not work.has(DRAWN):
                found = drawn_windows(whole.load(), count, config.window + 1, CALIBRATION, progress)
                work.put(DRAWN, {"windows": found})
            return work.get(DRAWN)

        return hosts.of_first(drawn)["windows"]

    return with_unseen(windows, draw, config, whole.bytes)


def analyze_layers(
    source: LayerSource,
    windows: dict[str, Int[np.ndarray, "S T1"]],
    config: QuantizeConfig,
    work: Work,
    progress: Progress = no_progress,
    hosts: Hosts = ALONE,
) -> dict[str, Analysis]:
    """Run the sweeps on the windows of all datasets at once, behind the rest at ``config.rest`` bits; each one's sums,
    and those of its halves. work: of several processes, that of the first one counts."""
    work = SharedWork(work, hosts)
    source = with_rest(source, config.rest)
    tokens = np.concatenate(list(windows.values()))
    sizes = [size for w in windows.values() for size in ((len(w) + 1) // 2, len(w) // 2)]
    half = np.repeat(np.arange(len(sizes)), sizes)

    def favour(draft: Draft) -> Float[np.ndarray, "L E U 3"]:
        return favoured([draft], list(windows), config, [source.config.expert_sizes])[0]

    job = Calibration(
        source=source,
        tokens=tokens,
        dataset=half,
        datasets=len(sizes),
        group_size=config.group(source.config.hidden_size),
        channel_block=config.channel_block,
        apart=config.per_projection,
        quantizer=config.quantizer,
        asymmetric=config.asymmetric,
        emphasis=config.emphasis,
        favour=favour if config.favour != 1 else None,
        max_width=config.max_width,
        batch_size=config.batch_size,
        work=work,
        progress=progress,
        hosts=hosts,
    )
    calibrate(job)
    records = statistics_of(work, source.config)
    halves = []
    for index in range(len(sizes)):
        fields: dict[str, Any] = {f: np.stack([r[f][index] for r in records]) for f in Statistics._fields}
        halves.append(
            Analysis(
                Statistics(**fields),
                np.array([r["sensitivity"][index] for r in records]),
                np.stack([r["windows"][half == index] for r in records], axis=2),
            )
        )
    return {name: whole(halves[2 * i], halves[2 * i + 1]) for i, name in enumerate(windows)}


def _plan_and_knowledge(
    source: LayerSource,
    analyses: dict[str, Analysis],
    windows: dict[str, Int[np.ndarray, "S T1"]],
    known: dict[str, str],
    config: QuantizeConfig,
    progress: Progress,
) -> tuple[Plan, Knowledge]:
    progress("allocate", 0, 1)
    chosen = plan(analyses, source.config, config)
    calibrated = {name: (digest(known[name]), len(w)) for name, w in windows.items() if name != UNSEEN}
    knowledge = knowledge_of(analyses, config, calibrated)
    progress("allocate", 1, 1)
    return chosen, knowledge


def quantize(
    model: Decoder,
    tokenizer: tokenizers.Tokenizer,
    known: dict[str, str],
    config: QuantizeConfig | None = None,
    progress: Progress = no_progress,
) -> tuple[QuantizedModel, dict[str, Analysis]]:
    """Calibrate a model in memory on the known texts (name -> text), allocate under the budget, quantize.

    Returns the quantized model and what ``analyze`` finds on the way, by dataset. ValueError: no text, a text of less
    than a window, a budget that is too small, settings that do not fit the model, weights that are not finite.
    Source: DynaMo, arXiv 2503.21135; docs/design.md says what differs.
    """
    config = config or QuantizeConfig()
    source = DecoderSource(model)
    check_shapes(model.config, config)
    config = settled(config, [model.config.expert_sizes], source.other_bytes(config.rest), list(known))
    work = MemoryWork()
    windows = _checked_windows(known, tokenizer, config, model.config.vocab_size)
    windows = _and_unseen(Whole(lambda: model, 0), windows, config, work, progress, ALONE)
    analyses = analyze_layers(source, windows, config, work, progress)
    chosen, knowledge = _plan_and_knowledge(source, analyses, windows, known, config, progress)
    store = stacked_planes(work.get, model.config)
    if config.distil:
        store = _distilled(model, store, chosen, known, tokenizer, config, progress).planes
    own = without_experts(model.config, parameters(model))
    quantized = QuantizedModel(
        config=model.config,
        parameters={name: jnp.asarray(a) for name, a in with_quantized_rest(own, config.rest).items()},
        tokenizer=tokenizer,
        store=store,
        plan=chosen,
        window=config.window,
        knowledge=knowledge,
        files=side_files_of(model.config, tokenizer),
        spare=config.spare,
    )
    return quantized, analyses


def _checked_windows(
    known: dict[str, str], tokenizer: tokenizers.Tokenizer, config: QuantizeConfig, vocab_size: int
) -> dict[str, Int[np.ndarray, "S T1"]]:
    """Those of calibration. ValueError, before any work, also if the texts are too short for what follows."""
    found = known_windows(known, tokenizer, config, vocab_size)
    if config.distil:
        given_to_distil(known, tokenizer, config)
    return found


def _distilled(
    model: Decoder,
    planes: Planes,
    plan: Plan,
    known: dict[str, str],
    tokenizer: tokenizers.Tokenizer,
    config: QuantizeConfig,
    progress: Progress,
) -> Distilled:
    from dynamo_jax.calibration.distil import distil  # and with it an optimizer, which others need not wait for

    windows = distil_windows(model, known, tokenizer, config, progress)
    return distil(model, planes, plan, windows, config.distil, config.batch_size, progress, config.rest)


def _distil_work(
    source: Source,
    work: Work,
    plan: Plan,
    known: dict[str, str],
    tokenizer: tokenizers.Tokenizer,
    config: QuantizeConfig,
    progress: Progress,
    log: Log,
) -> None:
    """Put distilled planes in the place of the layers'. All of them are one bundle first, so that a run that is killed
    while they are put there does not train what it has trained."""
    if not work.has(DISTILLED):
        planes = stacked_planes(work.get, source.config)
        model = load_decoder(source.folder)
        found = _distilled(model, planes, plan, known, tokenizer, config, progress)
        log(found.words())
        work.put(DISTILLED, planes_bundle(found.planes))
    planes = layer_planes(work.get(DISTILLED))
    for index, layer in enumerate(source.config.moe_layers):
        own = jax.tree.map(lambda a, index=index: a[index], planes)
        work.put(layer_name(layer), work.get(layer_name(layer)) | planes_bundle(own))


def quantize_folder(
    folder: str | Path,
    out: str | Path,
    known: dict[str, str],
    config: QuantizeConfig | None = None,
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
    log: Log = no_log,
    found: Found = no_analysis,
    hosts: Hosts = ALONE,
) -> Plan:
    """As ``quantize``, for a Hugging Face folder that memory need not hold; the result is the folder ``out``, which is
    missing or empty, or with ``overwrite`` an earlier result.

    Unfinished work lies in ``out``/unfinished. The same call goes on there at the last finished layer, and the result
    is the same bits; if ``out`` has the result of the same call, nothing is done. ``log`` is told either. ``found`` is
    called with what ``analyze`` finds on the way, before the result is made.

    hosts: the processes that share the work out (``all_hosts()``), all of which call this. Each reads ``folder``; only
    the first one looks at ``out``, and calls ``progress`` and ``log``. The bits do not depend on how many processes
    there are, nor on how many an unfinished run had.

    ValueError: as ``quantize``, and a folder that is not whole, or is not free; processes that were not given the same;
    an error of another process. ``runtime.hosts.ProcessGone``: one is gone.
    """
    with hosts.together():
        if not hosts.first:
            progress, log = no_progress, no_log
        config = config or QuantizeConfig()
        how = config, progress, overwrite, log, found, hosts
        return _quantize_folder(Path(folder), Path(out).resolve(), known, *how)


def _quantize_folder(
    folder: Path,
    out: Path,
    known: dict[str, str],
    config: QuantizeConfig,
    progress: Progress,
    overwrite: bool,
    log: Log,
    found: Found,
    hosts: Hosts,
) -> Plan:
    source = Source(folder)
    check_shapes(source.config, config)
    rest_bytes = source.other_bytes(config.rest)
    config = settled(config, [source.config.expert_sizes], rest_bytes, list(known))
    files = side_files(folder)
    hosts.check_same(_given(source, known, config, files))
    job: dict[str, Any] = {
        "command": "quantize",
        "format": [WORK_FORMAT, checkpoint.FORMAT],
        "settings": dataclasses.asdict(config),
        "texts": [[name, digest(text)] for name, text in known.items()],  # in order: windows have that of the texts
        "model": digest(json.dumps([source.fingerprint(), _digests(files)])),
    }
    if hosts.of_first(lambda: {"done": np.array(is_done(out, checkpoint.META, job))})["done"]:
        log(f"{out}: done already, by the same command")
        return _plan_of_first(hosts, lambda: checkpoint.read_description(out).plan)
    tokenizer = load_tokenizer(folder)
    windows = _checked_windows(known, tokenizer, config, source.config.vocab_size)

    def and_unseen(work: Work) -> dict[str, Int[np.ndarray, "S T1"]]:
        return _and_unseen(_whole(source), windows, config, work, progress, hosts)

    if not hosts.first:
        other = MemoryWork()
        analyze_layers(source, and_unseen(other), config, other, hosts=hosts)
        return _plan_of_first(hosts, _never)
    with Making(out, checkpoint.META, job, overwrite=overwrite) as making:
        work = FolderWork(making.folder)
        if steps := work.names():
            log(f"goes on in {making.folder}, where {len(steps)} steps are finished, the last one {steps[-1]}")

        def finished() -> Plan:
            found(analyses)
            chosen, knowledge = _plan_and_knowledge(source, analyses, windows, known, config, progress)
            if config.distil:
                _distil_work(source, work, chosen, known, tokenizer, config, progress, log)
            sizes = config.window, config.spare, config.max_width, source.expert_bytes(), source.other_bytes()
            facts = checkpoint.Facts(*sizes, tuple(source.unread), job, source.expert_format(), source.fused())
            facts = facts._replace(rest=config.rest, rest_bytes=rest_bytes)
            checkpoint.publish(making, work, source.config, chosen, facts, knowledge, files)
            return chosen

        try:
            calibrated = and_unseen(work)
            if UNSEEN not in calibrated and config.unseen_count(len(known)):
                log(f"the model is larger than {DRAWING_BYTES:,} bytes: it draws no text; {HOW_TO_DRAW}")
            analyses = analyze_layers(source, calibrated, config, work, progress, hosts)
            return _plan_of_first(hosts, finished)
        except (KeyboardInterrupt, OSError) as error:
            if work.names():
                error.add_note(f"what is finished is kept in {making.folder}; the same command goes on there")
            raise


def _never() -> Plan:
    raise AssertionError("the first process makes the plan")


def _plan_of_first(hosts: Hosts, make: Callable[[], Plan]) -> Plan:
    """The plan that ``make`` gives on the first process, for all."""
    fields = [field.name for field in dataclasses.fields(Plan)]
    told = hosts.of_first(lambda: {name: np.asarray(getattr(made, name)) for made in [make()] for name in fields})
    values: dict[str, Any] = {name: a if a.ndim else a.item() for name, a in told.items()}
    return Plan(**values)
