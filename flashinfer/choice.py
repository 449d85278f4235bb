"""Which predictor a run uses, of those its store has. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import msgspec

from flashinfer.errors import PredictorError
from flashinfer.store import Calibration, Experts, Facts, Level, Manifest
from flashinfer.store.calibration import Approximate

Kind = Literal["exact", "certified", "low-rank", "threshold", "all", "router"]
"""`exact`: the sign of the decision product. `all`: every neuron. `router`: that of a mixture of experts, which is also
what `exact` and `auto` mean there."""
APPROXIMATIONS: tuple[Approximate, ...] = get_args(Approximate)
_ROLES: dict[Kind, tuple[str, ...]] = {
    "certified": (".sketch.",), "low-rank": (".lowrank.",), "threshold": (".threshold",)
}  # fmt: skip
CALIBRATE = "run `flashinfer calibrate STORE --text FILE`"


@dataclass(frozen=True)
class Choice:
    """A predictor, and for an approximation the level it runs at. `experts`: how many a token gets, where it is not as
    many as the model was made for."""

    kind: Kind = "exact"
    level: Level | None = None
    experts: int | None = None

    def selects(self, facts: Facts) -> bool:
        """Whether some neurons can be left out at all; else every step needs all of them."""
        return self.kind != "all" and (self.kind != "exact" or facts.sparse)

    @property
    def approximates(self) -> bool:
        """Whether the output is not the model's."""
        return self.level is not None or self.experts is not None

    @property
    def note(self) -> str:
        """For people: empty where nothing is approximated."""
        if self.experts is not None:
            return f"{self.experts} experts for each token, which is not what the model was made for"
        if self.level is None:
            return ""
        worse = self.level.perplexity / self.level.exact_perplexity - 1.0
        what = "recall" if self.kind == "low-rank" else "density"
        return f"{self.kind} predictor at {what} {self.level.target:g} (perplexity {worse:+.2%} when calibrated)"


def choices(m: Manifest, calibration: Calibration | None, asked: str, max_ppl_increase: float) -> list[Choice]:
    """What `asked` allows: one predictor, or for `auto` all within that share of perplexity, exact ones first.

    asked: `exact`, `certified`, `all`, `auto`, or `low-rank`, `threshold`, with `:TARGET` for a recorded level; or
    `router`, with `:N` for so many experts for each token.

    Raises:
        PredictorError: the store has no such predictor, or not at that level.
        ValueError: there is no such name.
    """
    name, target = parse_predictor(asked)
    if m.facts.experts is not None:
        return [_routed(m.facts.experts, name, int(target) if name == "router" and target else None)]
    if name == "router":
        raise PredictorError("this model is dense: it has no experts of which a router could choose some")
    if name == "auto":
        return [_exact(m), *_good_enough(m, calibration, max_ppl_increase)]
    if name == "all":
        return [Choice("all")]
    if name == "exact":
        return [_exact(m)]
    if name == "certified":
        if not has(m, "certified"):
            raise PredictorError(f"this store has no certified predictor; {CALIBRATE}")
        return [Choice("certified")]
    kind: Approximate = "low-rank" if name == "low-rank" else "threshold"
    return [Choice(kind, _level(m, calibration, kind, target))]


def under_adapter(m: Manifest, asked: str, decides: bool) -> Choice:
    """What is left of `asked` with a run-time adapter: what a store was calibrated for holds without one.

    decides: it changes decision products, of which the certified predictor knows only the store's. Then a store whose
    decision matrices are in its bundles reads all neurons.

    Raises:
        PredictorError: a predictor that would have to be calibrated with the adapter, or that the store has not.
        ValueError: there is no such name.
    """
    name, _ = parse_predictor(asked)
    if name in APPROXIMATIONS or (name == "certified" and decides):
        raise PredictorError(
            f"the {name} predictor belongs to a store without an adapter; use exact, or make a store with "
            "`flashinfer pack --merge-adapter` and calibrate that"
        )
    (found,) = choices(m, None, "exact" if name == "auto" else asked, 0.0)
    return Choice("all") if found.kind == "certified" and decides else found


def _routed(experts: Experts, name: str, per_token: int | None) -> Choice:
    """What a mixture of experts runs with."""
    if name not in ("exact", "auto", "router", "all"):
        raise PredictorError(
            f"{name} is for dense models; of a mixture of experts the router says who is needed: leave --predictor out"
        )
    most = experts.count // experts.groups * experts.top_groups
    if per_token is not None and not 1 <= per_token <= most:
        raise PredictorError(f"{per_token} experts for each token is not in 1..{most}, what this model can choose")
    other = per_token if per_token != experts.per_token else None
    return Choice("all" if name == "all" else "router", experts=other)


def parse_predictor(asked: str) -> tuple[str, str]:
    """The name, and the target behind the colon or an empty text. Raises ValueError: there is no such name."""
    name, colon, target = asked.partition(":")
    fits = (bool(target) and name in APPROXIMATIONS) or (name == "router" and target.isdecimal() and int(target) > 0)
    if name not in (*get_args(Kind), "auto") or (colon and not fits):
        names = ", ".join((*get_args(Kind), "auto"))
        raise ValueError(
            f"predictor must be one of {names} (low-rank and threshold also with :TARGET, router with :EXPERTS), "
            f"not {asked!r}"
        )
    return name, target


def has(m: Manifest, kind: Kind) -> bool:
    """Whether the store carries what that predictor needs."""
    if kind == "router":
        return m.facts.experts is not None
    return kind in ("exact", "all") or any(_belongs(role, kind) for role in m.tensors)


def restricted(m: Manifest, choice: Choice) -> Manifest:
    """The manifest without the tensors of predictors that are not used: they take no memory, and are not read."""
    tensors = {r: t for r, t in m.tensors.items() if t.file != "predictors" or _belongs(r, choice.kind)}
    return msgspec.structs.replace(m, tensors=tensors)


def _belongs(role: str, kind: Kind) -> bool:
    return any(part in role for part in _ROLES.get(kind, ()))


def _exact(m: Manifest) -> Choice:
    """Exact output: from the decision matrix; where that is in the bundles, by the certified superset."""
    bundled = any(layer.decision == "bundled" for layer in m.layers)
    if not bundled or not m.facts.sparse:
        return Choice("exact")
    return Choice("certified" if has(m, "certified") else "all")


def _good_enough(m: Manifest, calibration: Calibration | None, max_ppl_increase: float) -> list[Choice]:
    found = calibration.levels if calibration is not None else ()
    allowed = [n for n in found if n.perplexity <= n.exact_perplexity * (1.0 + max_ppl_increase)]
    return [Choice(level.predictor, level) for level in allowed if has(m, level.predictor)]


def _level(m: Manifest, calibration: Calibration | None, kind: Approximate, target: str) -> Level:
    """The level asked for, or the one calibration chose."""
    there = [level for level in calibration.levels if level.predictor == kind] if calibration is not None else []
    if calibration is None or not has(m, kind) or not there:
        raise PredictorError(f"this store has no {kind} predictor; {CALIBRATE}")
    if not target and kind in calibration.chosen:
        return calibration.levels[calibration.chosen[kind]]
    for level in there:
        if f"{level.target:g}" == target:
            return level
    known = ", ".join(f"{kind}:{level.target:g}" for level in there)
    raise PredictorError(f"this store was not calibrated for {kind}{target and f':{target}'}; there are {known}")
