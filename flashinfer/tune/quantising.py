"""What quantising a store is told, and what its steps share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from flashinfer import __version__
from flashinfer.backend import Backend
from flashinfer.errors import QuantError
from flashinfer.pack.recipe import Recipe
from flashinfer.quant import PLAIN, Codec, LlmInt8, codec_with
from flashinfer.store import Facts, Manifest, Store
from flashinfer.store.roles import ffn_role, outliers_role
from flashinfer.tune.ends import Ends
from flashinfer.tune.gather import Source
from flashinfer.tune.job import Progress
from flashinfer.tune.layerwise import Layer, States, run_layer
from flashinfer.tune.perplexity import Score
from flashinfer.tune.recode import Prepared, Recoded
from flashinfer.tune.work import Work

Ids = npt.NDArray[np.int64]
HIGHER = "int8"
"""What a matrix is in where `llm.int8` is not for it, or a codec of fewer bits loses too much."""
_PLAIN = frozenset(codec.name for codec in PLAIN)


@dataclass(frozen=True)
class QuantOptions:
    """How to quantise.

    recipe: as `--quant` has it (`pack.recipe`). gptq: whether errors are made up for (`gptq`); act_order: rows with the
    largest inputs first. max_ppl_increase: share of perplexity it may cost; None: whatever it costs. tokens: of the
    text, for GPTQ; held_out: to judge by; context: of the windows it is run in.
    """

    recipe: str
    gptq: bool = False
    act_order: bool = True
    max_ppl_increase: float | None = None
    tokens: int = 16384
    held_out: int = 2048
    context: int = 256

    def key(self, m: Manifest, text: str) -> str:
        """Names the work: of these weights and that tokenizer, by that text, so, by this program."""
        files = [entry.xxh3 for entry in (m.dense, m.neurons, *m.text.values())]
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(["quant", __version__, files, text, asdict(self)]))


@dataclass(frozen=True)
class QuantJob:
    """One quantisation. fit, judge: windows of tokens, each of them begins anew; context: of the longest."""

    store: Store
    work: Work
    options: QuantOptions
    backend: Backend
    fit: Sequence[Ids]
    judge: Sequence[Ids]
    context: int
    progress: Progress
    outliers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Columns by their role, for `llm.int8`."""

    @property
    def facts(self) -> Facts:
        """Of the model."""
        return self.store.manifest.facts

    def codec(self, role: str, name: str) -> Codec:
        """The codec of that name for a matrix."""
        return codec_with(name, self.outliers.get(outliers_role(role) or "", ()))

    def recoded(self, codecs: Mapping[str, str], prepared: Prepared = lambda layer: {}) -> Recoded:
        """The store in these codecs, by role."""
        return Recoded(self.store, codecs, self.outliers, prepared)

    def states(self, name: str) -> States:
        """A file of hidden states."""
        return States(self.work.path / f"{name}.states", self.facts.hidden_size)

    def score(self, source: Source, what: str) -> Score:
        """The held-out text under the weights of a source; noted as `what`."""
        if (done := self.work.done(what)) is None:
            score = walk(self, source, self.judge, what)
            done = [score.nll, score.tokens]
            self.work.note(what, done)
        return Score(*done)


def walk(
    job: QuantJob, source: Source, windows: Sequence[Ids], what: str, before: States | None = None, first: int = 0
) -> Score:
    """Windows through the layers of a source from `first` on, where their states are `before`; None: from the tokens.

    Raises:
        StoreError, DiskFullError: a file cannot be read or written. QuantError: a value does not fit its codec.
    """
    counts, files = [len(ids) for ids in windows], [job.states("one"), job.states("other")]
    with ExitStack() as stack:
        stack.enter_context(source)
        for file in files:
            stack.callback(file.remove)
        ends = Ends(source, job.backend, job.context)
        if before is None:
            ends.embed(windows, before := files[1].restart())
        for i in range(first, job.facts.num_layers):
            after = files[0].restart()
            run_layer(Layer(source, i), job.facts, job.backend, counts, before, after)
            before, files = after, files[::-1]
            job.progress(what, i + 1, job.facts.num_layers)
        return ends.score(windows, before)


def codecs_of(manifest: Manifest, recipe: Recipe) -> dict[str, str]:
    """By role, the codec of every matrix whose codec the recipe changes. `llm.int8` is for matrices of the dense file
    that multiply inputs of a layer; others are `int8` then.

    Raises:
        QuantError: a matrix is quantised already, a name fits no matrix, or nothing would change.
    """
    now = matrices_of(manifest)
    if unused := recipe.unused([*now], manifest.facts):
        raise QuantError(f"quant names {', '.join(unused)}, which fits no matrix of this model; take it out")
    wanted = {role: recipe.codec(role, manifest.facts) for role in now}
    for role, codec in wanted.items():
        if codec == LlmInt8.name and (role not in manifest.tensors or outliers_role(role) is None):
            wanted[role] = HIGHER
    changed = {role: codec for role, codec in wanted.items() if codec is not None and codec != now[role]}
    for role in changed:
        if now[role] not in _PLAIN:
            raise QuantError(
                f"{role} is {now[role]} already, and quantising it again would lose twice; pack the checkpoint again"
            )
    if not changed:
        raise QuantError("every matrix has the codec that is asked for already; there is nothing to quantise")
    return changed


def matrices_of(manifest: Manifest) -> dict[str, str]:
    """The codec of every matrix of the model by role, predictors left out."""
    found = {role: t.codec for role, t in manifest.tensors.items() if t.file == "dense" and len(t.shape) == 2}
    for i, layer in enumerate(manifest.layers):
        found |= {ffn_role(i, p.role): p.codec for p in layer.parts if p.role.endswith(".weight")}
    return found


def parts_of(codecs: Mapping[str, str], layer: int) -> dict[str, str]:
    """Those of one layer, by part (`attn.q.weight`, ...)."""
    prefix = f"layers.{layer}."
    return {role.removeprefix(prefix): codec for role, codec in codecs.items() if role.startswith(prefix)}
