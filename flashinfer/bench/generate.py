"""Decoding measured mode against mode, interleaved: streamed with a cache, always-miss, naive.

Beside what a token took stand what the plan had predicted, and its *bound*: what its bytes alone take, read from flash
by the measured curve and then multiplied with at the rate of a plain scan of memory, one after the other. Lookahead
may beat that bound: it reads while it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flashinfer import machine
from flashinfer.bench.basis import Basis
from flashinfer.config import Cap, IoObjective, RunConfig
from flashinfer.engine import Model
from flashinfer.memory import Mode
from flashinfer.store import Store


@dataclass(frozen=True)
class Setting:
    """What one row of the comparison runs."""

    mode: Mode
    objective: IoObjective
    predictor: str = RunConfig.predictor


COMPARISON = (
    Setting("cached", "bytes"),
    Setting("cached", "time"),
    Setting("always-miss", "bytes"),
    Setting("always-miss", "time"),
    Setting("naive", "time"),
)


@dataclass(frozen=True)
class Sample:
    """One run of one setting over the same tokens; bytes and milliseconds are per decoded token.

    device_bytes: what the kernel says it fetched for this process (None where it does not say). management_*: planning
    and cache bookkeeping, copies of records and handing reads to the kernel (see `ledger`). first_token_s: loading and
    prompt. predicted_*, bound_ms: see above; None where nothing was measured that they could rest on.
    """

    mode: Mode
    objective: IoObjective
    predictor: str
    weights_in_memory: int
    bytes_read: float
    device_bytes: float | None
    reads: float
    useful_share: float
    hit_rate: float
    effective_window: int
    tokens_per_second: float
    io_wait_ms: float
    management_ms: float
    management_share: float
    compute_ms: float
    first_token_s: float
    token_ms: float
    predicted_first_token_s: float | None = None
    predicted_ms: float | None = None
    predicted_bytes: float | None = None
    bound_ms: float | None = None


def continue_greedily(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens after the prompt: the script every setting replays."""
    session = model.session()
    logits, out = model.step(session, prompt), []
    for _ in range(count):
        out.append(int(np.argmax(logits)))
        logits = model.step(session, out[-1:])
    return out


def run_setting(
    store: Path | Store, setting: Setting, prompt: Sequence[int], script: Sequence[int], run: RunConfig, cap: Cap,
    device: str = "cpu", basis: Basis | None = None,
) -> Sample:  # fmt: skip
    """Open the store, process the prompt, replay the script token by token. basis: what predictions rest on."""
    run = replace(run, io=replace(run.io, objective=setting.objective), predictor=setting.predictor)
    context = len(prompt) + len(script)
    with Model.open(store, cap, run=run, mode=setting.mode, context=context, device=device) as model:
        session = model.session()
        model.step(session, prompt)
        before = machine.device_bytes_read()
        for token in script:
            model.step(session, [token])
        after = machine.device_bytes_read()
        account, n = model.ledger.decode, len(script)
        return Sample(
            mode=setting.mode,
            objective=setting.objective,
            predictor=setting.predictor,
            weights_in_memory=model.plan.weight_total,
            bytes_read=account.bytes_per_token,
            device_bytes=None if before is None or after is None else (after - before) / n,
            reads=account.reads / n,
            useful_share=account.useful_bytes / max(1, account.bytes_read),
            hit_rate=account.hit_rate,
            effective_window=model.effective_window,
            tokens_per_second=account.tokens_per_second,
            io_wait_ms=1e3 * account.io_wait / n,
            management_ms=1e3 * account.management / n,
            management_share=account.management_share,
            compute_ms=1e3 * account.compute / n,
            first_token_s=model.ledger.load.seconds + model.ledger.prefill.seconds,
            token_ms=1e3 * account.seconds / n,
            **({} if basis is None else _promised(model, basis, run, len(prompt))),
        )


def _promised(model: Model, basis: Basis, run: RunConfig, prompt_tokens: int) -> dict[str, float]:
    """What was predicted of this run, and the bound of what it did."""
    p, account = model.predict(basis.disk, basis.rates, prompt_tokens=prompt_tokens), model.ledger.decode
    reads = account.reads / account.tokens
    flash = basis.disk.seconds(reads, account.bytes_per_token, min(run.io.in_flight, max(1.0, reads)))
    return {
        "predicted_first_token_s": p.load_seconds + p.first_token_seconds,
        "predicted_ms": 1e3 * p.token_seconds,
        "predicted_bytes": p.flash_bytes,
        "bound_ms": 1e3 * (flash + p.dram_bytes / basis.rates.dram),
    }


def compare(
    store: Path,
    prompt: Sequence[int],
    *,
    tokens: int,
    rounds: int,
    run: RunConfig,
    cap: Cap,
    settings: Sequence[Setting] = COMPARISON,
    device: str = "cpu",
    basis: Basis | None = None,
    on_sample: Callable[[Sample], None] = lambda _: None,
) -> list[list[Sample]]:
    """`rounds` samples of every setting, interleaved (all settings in each round). One list per setting."""
    context = len(prompt) + tokens
    with Model.open(store, cap, run=run, context=context, device=device) as model:
        script = continue_greedily(model, prompt, tokens)
    samples: list[list[Sample]] = [[] for _ in settings]
    for _ in range(rounds):
        for kept, setting in zip(samples, settings, strict=True):
            kept.append(run_setting(store, setting, prompt, script, run, cap, device, basis))
            on_sample(kept[-1])
    return samples


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians of the numbers, and the spread of the speed."""
    first = asdict(samples[0])
    middle = {
        name: median(getattr(s, name) for s in samples) if isinstance(value, (int, float)) else value
        for name, value in first.items()
    }
    speeds = [s.tokens_per_second for s in samples]
    return middle | {"rounds": len(samples), "tokens_per_second_range": [min(speeds), max(speeds)]}
