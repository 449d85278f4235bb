"""Which matrices stay in more bits, so that a quantised store is within a perplexity.

Greedy, by what is lost for each byte that is saved:

1. Of each group (attention or feed-forward matrices of a layer; embedding, head) the cost alone: by how much the mean
   negative log-likelihood of the first held-out tokens rises when only this group is rounded.
2. Groups in falling order of cost per byte saved. Moves are: each of them to int8, in that order, where its codec has
   fewer bits; then each of them back to its own type, in that order.
3. The fewest moves with which the whole held-out text is within the perplexity, by bisection: more moves are taken to
   lose no more. What is found was judged itself, so this holds in any case.

Matrices are rounded to nearest meanwhile; GPTQ comes after. All measurements are kept by the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flashinfer.errors import QuantError
from flashinfer.store.roles import role_shapes
from flashinfer.tune.ends import Ends
from flashinfer.tune.gather import Source
from flashinfer.tune.layerwise import Layer, run_layer
from flashinfer.tune.perplexity import Score
from flashinfer.tune.quantising import HIGHER, Ids, QuantJob, matrices_of, walk

FEW = 512
"""Held-out tokens that groups are judged by alone, about."""


@dataclass(frozen=True)
class Group:
    """Matrices that are kept together. layer: theirs; None: they are of none."""

    name: str
    roles: tuple[str, ...]
    layer: int | None


def allowed_codecs(job: QuantJob, asked: Mapping[str, str], limit: float) -> dict[str, str]:
    """By role, the codecs with which the perplexity of the held-out text is at most `limit`.

    Raises:
        QuantError: nothing of the store can be quantised within it; says what is reached.
    """

    def perplexity(codecs: Mapping[str, str], what: str) -> float:
        return job.score(job.recoded(codecs), what).perplexity

    if perplexity(asked, "judging all in what is asked for") <= limit:
        return dict(asked)
    steps = moves(job, asked)
    fails, holds = 0, len(steps)
    while holds - fails > 1:
        middle = (fails + holds) // 2
        good = perplexity(after(asked, steps[:middle]), f"judging with {middle} of {len(steps)} kept") <= limit
        fails, holds = (fails, middle) if good else (middle, holds)
    found = after(asked, steps[:holds])
    if not found:
        least = after(asked, steps[:-1])
        reached = perplexity(least, f"judging with {len(steps) - 1} of {len(steps)} kept")
        raise QuantError(
            f"nothing can be quantised within a perplexity of {limit:.5g}: with only {', '.join(least)} it is "
            f"{reached:.5g}; allow more with --max-ppl-increase"
        )
    return found


def after(asked: Mapping[str, str], steps: Sequence[Mapping[str, str | None]]) -> dict[str, str]:
    """The codecs once these moves are made; what goes back to its own type is left out. Pure."""
    codecs: dict[str, str | None] = dict(asked)
    for step in steps:
        codecs |= step
    return {role: codec for role, codec in codecs.items() if codec is not None}


def moves(job: QuantJob, asked: Mapping[str, str]) -> list[dict[str, str | None]]:
    """What can be kept, best first: by role its codec, None its own type."""
    saved = _Saved(job, asked)
    costs = _costs(job, asked)
    order = sorted(costs, key=lambda group: costs[group] / saved.bytes(group), reverse=True)
    higher: list[dict[str, str | None]] = []
    for group in order:
        roles = {role: HIGHER for role in group.roles if saved.between(role)}
        if roles:
            higher.append(dict(roles))
    return higher + [dict.fromkeys(group.roles) for group in order]


class _Saved:
    """Bytes of matrices in one codec and another."""

    def __init__(self, job: QuantJob, asked: Mapping[str, str]) -> None:
        self._shapes, self._now, self._asked = role_shapes(job.facts), matrices_of(job.store.manifest), asked
        self._codec = job.codec

    def bytes(self, group: Group) -> int:
        """What quantising the group saves, at least 1."""
        return max(1, sum(self._size(r, self._now[r]) - self._size(r, self._asked[r]) for r in group.roles))

    def between(self, role: str) -> bool:
        """Whether int8 lies between what is asked for and what the matrix has."""
        return self._size(role, self._asked[role]) < self._size(role, HIGHER) < self._size(role, self._now[role])

    def _size(self, role: str, codec: str) -> int:
        rows, columns = self._shapes[role][::-1] if role.endswith(".ffn.down.weight") else self._shapes[role]
        return rows * self._codec(role, codec).row_bytes(columns)


def groups_of(roles: Iterable[str]) -> list[Group]:
    """Roles by layer and kind; others each alone. Pure."""
    found: dict[tuple[str, int | None], list[str]] = {}
    for role in roles:
        words = role.split(".")
        key = (".".join(words[:3]), int(words[1])) if words[0] == "layers" else (role, None)
        found.setdefault(key, []).append(role)
    return [Group(name, tuple(some), layer) for (name, layer), some in found.items()]


def _costs(job: QuantJob, asked: Mapping[str, str]) -> dict[Group, float]:
    """What each group costs alone, in nats a token."""
    few = _few(job.judge)
    groups = groups_of(asked)
    names = {group: f"judging {group.name} alone" for group in groups}
    if any(job.work.done(name) is None for name in names.values()):
        base = _through(job, few)
        for group in groups:
            if job.work.done(names[group]) is None:
                source = job.recoded({role: asked[role] for role in group.roles})
                before, first = (None, 0) if group.layer is None else (job.states(f"few-{group.layer}"), group.layer)
                score = walk(job, source, few, names[group], before, first)
                job.work.note(names[group], (score.nll - base.nll) / base.tokens)
        for i in range(job.facts.num_layers):
            job.states(f"few-{i}").remove()
    return {group: float(job.work.done(name) or 0.0) for group, name in names.items()}


def _through(job: QuantJob, windows: Sequence[Ids]) -> Score:
    """Windows through the model as it is; the states before every layer stay in files."""
    with Source(job.store) as source:
        ends, counts = Ends(source, job.backend, job.context), [len(ids) for ids in windows]
        states = job.states("few-0").restart()
        ends.embed(windows, states)
        for i in range(job.facts.num_layers):
            before, states = states, job.states(f"few-{i + 1}").restart()
            run_layer(Layer(source, i), job.facts, job.backend, counts, before, states)
        score = ends.score(windows, states)
        states.remove()
        return score


def _few(windows: Sequence[Ids]) -> list[Ids]:
    """The first windows, of FEW tokens together, one at least."""
    found, tokens = list[Ids](), 0
    for ids in windows:
        if found and tokens >= FEW:
            break
        found.append(ids)
        tokens += len(ids)
    return found
