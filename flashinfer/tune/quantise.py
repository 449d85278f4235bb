"""`calibrate --quant`: the matrices of a store in other codecs, and what that costs on a text.

Layer by layer, in memory of one layer in float32. GPTQ sees what comes out of the layers before as they will be, which
is how its authors do it: what a layer is given is what it will be given, so it makes up for their errors, too, and the
text is run through each layer when its weights are there. Values are computed with as the codec has them, in float32,
whatever the backend has kernels for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy.typing as npt

from flashinfer import machine
from flashinfer.backend import open_backend
from flashinfer.config import PACK_BLOCK, Cap, RunConfig
from flashinfer.errors import CapTooSmallError, QuantError, StoreError, TextError
from flashinfer.pack.recipe import parse_recipe
from flashinfer.quant import LlmInt8, codec_with
from flashinfer.request import threads_for
from flashinfer.store import Facts, Manifest, Store, StoreUpdate, open_store
from flashinfer.store.neurons import Bytes
from flashinfer.text import load_tokenizer
from flashinfer.tune.collect import windows_of
from flashinfer.tune.ends import CHUNK, Ends
from flashinfer.tune.gather import Source
from flashinfer.tune.hessian import Hessians, inputs_of, round_layer, width_of
from flashinfer.tune.job import Progress
from flashinfer.tune.layerwise import Layer, run_layer
from flashinfer.tune.outliers import with_outliers
from flashinfer.tune.perplexity import bos_of
from flashinfer.tune.quantising import Ids, QuantJob, QuantOptions, codecs_of, parts_of
from flashinfer.tune.recode import Recoded
from flashinfer.tune.rewrite import Decision, plan_rewrite, rewrite
from flashinfer.tune.sensitive import allowed_codecs
from flashinfer.tune.text import read_tokens, split
from flashinfer.tune.work import Work, check_writable
from flashinfer.units import MIB, format_size

LEAST_TOKENS = 16
"""Of a text."""
LEAST_INPUTS = 2
"""Tokens that GPTQ takes at the least, for each value of a hidden state."""


@dataclass(frozen=True)
class QuantReport:
    """What quantising came to. before, after: perplexity of the held-out text, of so many tokens. codecs: by role, of
    the matrices that changed; kept: of those that the perplexity allowed did not leave in what was asked for. dropped:
    whether predictors had to go. resumed: whether it went on with what an earlier one had done."""

    old: Manifest
    manifest: Manifest
    before: float
    after: float
    tokens: int
    codecs: Mapping[str, str]
    kept: Mapping[str, str]
    dropped: bool
    resumed: bool


def quantise(
    path: Path, text: Path, options: QuantOptions, *, cap: Cap, run: RunConfig, device: str, progress: Progress
) -> QuantReport:
    """Put the matrices of the store at `path` into the codecs of a recipe. It changes all at once in the end, or not at
    all; what was done until an interruption is kept in its directory, and used by the next call with the same
    arguments.

    Neurons stay in their order, and records get the size that suits the smaller bundles. Predictors and statistics go:
    they are of the weights as they were.

    Args:
        cap: of the whole process, in every step.
        run: threads and backend that the text is run with.

    Raises:
        QuantError: the store cannot be quantised so, or not within the perplexity allowed.
        TextError: the text cannot be used. CapTooSmallError: a layer takes more than the cap leaves.
        StoreBusyError: someone else changes the store. DiskFullError: no room. DeviceError, StoreError.
    """
    store = open_store(path)
    if store.manifest.facts.experts is not None:
        raise QuantError(
            f"{path} is a mixture of experts, which only `flashinfer pack --quant` can quantise: pack it again"
        )
    check_writable(store.root)
    try:
        codecs = codecs_of(store.manifest, parse_recipe(options.recipe, (LlmInt8.name,)))
    except ValueError as e:
        raise QuantError(str(e)) from e
    fit, judge, xxh3 = _windows(store, text, options)
    context = max(map(len, [*fit, *judge]))
    check_room(store.manifest.facts, codecs, options.gptq, context, cap)
    with StoreUpdate(store) as update:
        work = Work(store.root, options.key(store.manifest, xxh3))
        backend = open_backend(device, threads_for(store.manifest, run), run.backend)
        try:
            job = QuantJob(store, work, options, backend, fit, judge, context, progress)
            report = _quantised(job, update, codecs)
        except StoreError:
            if work.resumed:
                work.remove()  # it may be what was kept that is damaged: the next one begins anew
            raise
        finally:
            backend.close()
        work.remove()
    return report


def _windows(store: Store, text: Path, options: QuantOptions) -> tuple[list[Ids], list[Ids], str]:
    """Windows to fit to (of GPTQ), windows to judge by, and the text's checksum."""
    facts = store.manifest.facts
    tokenizer = load_tokenizer({name: store.path_of(entry) for name, entry in store.manifest.text.items()})
    fits = options.gptq or LlmInt8.name in options.recipe
    found = read_tokens(text, tokenizer, (options.tokens if fits else 0) + options.held_out, least=LEAST_TOKENS)
    fit, judge = found.ids[:0], found.ids
    if fits:
        fit, judge = split(found.ids, min(options.held_out, len(found.ids) // 4))
    least = LEAST_INPUTS * facts.hidden_size
    if options.gptq and len(fit) < least:
        raise TextError(
            f"GPTQ is left {len(fit)} tokens of {text}, and takes {least} at least, twice the hidden size; give a "
            "longer text, or more --tokens"
        )
    cut = partial(windows_of, context=min(options.context, facts.context_length), bos=bos_of(tokenizer))
    return cut(fit), cut(judge), found.xxh3


def check_room(facts: Facts, codecs: Mapping[str, str], gptq: bool, context: int, cap: Cap) -> None:
    """Raises CapTooSmallError where the cap does not leave what quantising takes."""
    size = quantising_bytes(facts, codecs, gptq, context)
    here = machine.resident_bytes()
    if cap.memory is not None and here + size > cap.memory:
        raise CapTooSmallError(
            f"quantising takes {format_size(size)} beside the {format_size(here)} the process has, one layer in float32"
            f"{' and what GPTQ knows of its inputs' if gptq else ''}, and the cap is {format_size(cap.memory)}; raise "
            "--memory",
            here + size,
        )


def quantising_bytes(facts: Facts, codecs: Mapping[str, str], gptq: bool, context: int) -> int:
    """Memory that quantising takes, in bytes, at most: a layer; its largest matrix again, as rows to be rounded and as
    their errors; blocks of weights; a window's activations, or a chunk's logits. With GPTQ moreover X^T X of each
    input, and a copy of the largest in another order."""
    hidden, neurons, heads = facts.hidden_size, facts.intermediate_size, facts.num_heads * facts.head_dim
    kv = facts.num_kv_heads * facts.head_dim
    layer = (2 * heads + 2 * kv + (3 if facts.gated else 2) * neurons) * hidden
    window = max(context * (8 * hidden + 6 * neurons), 3 * CHUNK * facts.vocab_size)
    total = layer + 3 * hidden * max(neurons, heads) + window
    if gptq:
        total += max(_hessians(facts, parts_of(codecs, i)) for i in range(facts.num_layers))
    return 4 * total + 3 * PACK_BLOCK + 8 * MIB


def _hessians(facts: Facts, parts: Mapping[str, str]) -> int:
    """Values of X^T X of all inputs of a layer, and of a copy of the largest."""
    known = {part: codec_with(name, ()) for part, name in parts.items()}
    sizes = [width_of(facts, part) ** 2 for part in inputs_of(facts, known)]
    return sum(sizes) + max(sizes, default=0)


def _quantised(job: QuantJob, update: StoreUpdate, codecs: dict[str, str]) -> QuantReport:
    job, codecs = with_outliers(job, codecs)
    update.require(_need(job, job.recoded(codecs)))
    before = job.score(Source(job.store), "judging the store as it is")
    asked, limit = codecs, job.options.max_ppl_increase
    if limit is not None:
        codecs = allowed_codecs(job, asked, before.perplexity * (1.0 + limit))
    if job.options.gptq:
        _fit(job, codecs)
    rounded = job.recoded(codecs, partial(_prepared, job))
    after = job.score(rounded, "judging the quantised store")
    if limit is not None and after.perplexity > before.perplexity * (1.0 + limit):
        raise QuantError(
            f"perplexity went from {before.perplexity:.4g} to {after.perplexity:.4g}, "
            f"{after.perplexity / before.perplexity - 1.0:+.2%}, and {limit:.2%} are allowed; leave out --gptq, or "
            "allow more with --max-ppl-increase"
        )
    old = job.store.manifest
    dropped = old.predictors is not None
    manifest = _rewritten(job, update, rounded)
    update.commit(manifest)
    kept = {role: codecs.get(role, "") for role in asked if codecs.get(role) != asked[role]}
    return QuantReport(
        old, manifest, before.perplexity, after.perplexity, after.tokens, codecs, kept, dropped, job.work.resumed
    )


def _fit(job: QuantJob, codecs: Mapping[str, str]) -> None:
    """Round all layers by GPTQ, one after the other; each is kept by the work."""
    counts, last = [len(ids) for ids in job.fit], job.facts.num_layers - 1
    if not job.work.done("embedding"):
        with job.recoded(codecs) as source:
            Ends(source, job.backend, job.context).embed(job.fit, job.states("fit-0").restart())
        job.work.note("embedding")
    with Source(job.store) as source:
        for i in range(job.facts.num_layers):
            before, names = job.states(f"fit-{i}"), parts_of(codecs, i)
            parts = {part: job.codec(f"layers.{i}.{part}", name) for part, name in names.items()}
            if not job.work.done(f"layer {i}"):
                layer, hessians = Layer(source, i), Hessians(job.facts, parts)
                run_layer(layer, job.facts, job.backend, counts, before, None, hessians)
                job.work.keep(f"layer-{i}", **round_layer(layer, parts, hessians, act_order=job.options.act_order))
                if i < last:
                    run_layer(layer, job.facts, job.backend, counts, before, job.states(f"fit-{i + 1}").restart())
                job.work.note(f"layer {i}")
            before.remove()
            job.progress("GPTQ", i + 1, job.facts.num_layers)


def _prepared(job: QuantJob, layer: int) -> dict[str, Bytes]:
    """What GPTQ made of a layer, by role; nothing where it was not asked for."""
    if not job.options.gptq:
        return {}
    return {f"layers.{layer}.{part}": data for part, data in job.work.kept(f"layer-{layer}").items()}


def _rewritten(job: QuantJob, update: StoreUpdate, source: Recoded) -> Manifest:
    """The store in these codecs."""
    decision, orders = _arrangement(job)
    return rewrite(
        job.store, update, decision=decision, orders=orders, source=source,
        progress=partial(job.progress, "writing the weights"),
    )  # fmt: skip


def _need(job: QuantJob, source: Recoded) -> int:
    """Bytes that all this takes on disk, at most: the new files, with GPTQ its layers beside them, and states."""
    decision, orders = _arrangement(job)
    old, codecs, outliers = job.store.manifest, source.codecs, source.outliers
    files = plan_rewrite(old, decision=decision, orders=orders, codecs=codecs, outliers=outliers).need
    tokens = sum(map(len, job.fit)) + sum(map(len, job.judge))
    return files * (2 if job.options.gptq else 1) + 8 * job.facts.hidden_size * tokens


def _arrangement(job: QuantJob) -> tuple[Decision, list[npt.ArrayLike | None]]:
    """Where decision matrices go (without its sketch one belongs into the dense file), and the orders there are."""
    old = job.store.manifest
    sketched = any(".sketch." in role for role in old.tensors)
    roles = [layer.permutation for layer in old.layers]
    orders: list[npt.ArrayLike | None] = [None if role is None else job.store.read_tensor(role) for role in roles]
    return "separate" if sketched else old.layers[0].decision, orders
