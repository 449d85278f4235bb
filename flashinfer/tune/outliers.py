"""Outlier columns for `llm.int8`, found on a text (LLM.int8(), arXiv 2208.07339, 3.2).

A column is an outlier of an input where its magnitude reaches 6.0 in at least 6 % of the tokens. The paper takes those
of which this holds in a quarter of the layers, and the same ones everywhere; here each input has its own. Where more
than one column in eight is so large, none stands out, and there are no outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from flashinfer.quant import LlmInt8
from flashinfer.store import Facts
from flashinfer.store.roles import outliers_role
from flashinfer.tune.ends import Ends
from flashinfer.tune.gather import Source
from flashinfer.tune.layerwise import Layer, run_layer
from flashinfer.tune.quantising import HIGHER, QuantJob

LARGE = 6.0
SHARE = 0.06
MOST = 1 / 8


class Reached:
    """A listener (`layerwise.Listener`): in how many tokens each column of an input was large, by part."""

    def __init__(self) -> None:
        self._counts: dict[str, npt.NDArray[np.int64]] = {}
        self._tokens: dict[str, int] = {}

    def __call__(self, part: str, x: npt.NDArray[np.float32]) -> None:
        """Count inputs `[tokens, columns]`."""
        self._counts[part] = (np.abs(x) >= LARGE).sum(axis=0) + self._counts.get(part, 0)
        self._tokens[part] = self._tokens.get(part, 0) + len(x)

    def outliers(self, part: str) -> tuple[int, ...]:
        """Columns that were large often enough, ascending; none where these are too many to stand out."""
        found = np.flatnonzero(self._counts[part] >= SHARE * self._tokens[part])
        return tuple(found.tolist()) if len(found) <= MOST * len(self._counts[part]) else ()


def with_outliers(job: QuantJob, codecs: Mapping[str, str]) -> tuple[QuantJob, dict[str, str]]:
    """The job with the outlier columns that `llm.int8` matrices have; those that have none are `int8`.

    Raises:
        StoreError, DiskFullError: states cannot be kept.
    """
    if LlmInt8.name not in codecs.values():
        return job, dict(codecs)
    if (found := job.work.done("outliers")) is None:
        found = _found(job)
        job.work.note("outliers", found)
    outliers = {role: tuple(columns) for role, columns in found.items() if columns}
    left = {r: HIGHER if c == LlmInt8.name and outliers_role(r) not in outliers else c for r, c in codecs.items()}
    return replace(job, outliers=outliers), left


def _found(job: QuantJob) -> dict[str, list[int]]:
    """By their role, outlier columns of all inputs."""
    found, counts = dict[str, list[int]](), [len(ids) for ids in job.fit]
    with Source(job.store) as source:
        before = job.states("heard-0").restart()
        Ends(source, job.backend, job.context).embed(job.fit, before)
        for i in range(job.facts.num_layers):
            after, reached = job.states(f"heard-{i + 1}").restart(), Reached()
            run_layer(Layer(source, i), job.facts, job.backend, counts, before, after, reached)
            for part in heard(job.facts):
                role = outliers_role(f"layers.{i}.{part}")
                assert role is not None
                found[role] = list(reached.outliers(part))
            before.remove()
            before = after
            job.progress("looking for outliers", i + 1, job.facts.num_layers)
        before.remove()
    return found


def heard(facts: Facts) -> list[str]:
    """Parts by which the inputs of a layer are known."""
    return ["attn.q.weight", "attn.o.weight", f"ffn.{facts.decision}.weight"]
