"""Which predictors are to be judged, and against which. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashinfer.choice import APPROXIMATIONS, CALIBRATE, Choice, choices, has, parse_predictor
from flashinfer.errors import PredictorError
from flashinfer.store import Calibration, Manifest


@dataclass(frozen=True)
class Candidates:
    """Names of predictors: against whom the others are held, None where nobody is, and the others."""

    against: str | None
    others: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.others if self.against is None else (self.against, *self.others)


def candidates(
    manifest: Manifest,
    calibration: Calibration | None,
    asked: Sequence[str],
    *,
    against: str | None,
    sweep: bool,
    max_ppl_increase: float,
) -> Candidates:
    """Those that are asked for, `exact` when nobody is, and with `sweep` every calibrated level; each once. Where one
    of them approximates, all are held against `exact`, unless `against` names another.

    Raises:
        PredictorError: the store does not have one of them, or no level at all to sweep.
        ValueError: there is no such name, or `against` names an approximation.
    """
    known = calibration.levels if calibration is not None else ()
    levels = [f"{level.predictor}:{level.target:g}" for level in known if has(manifest, level.predictor)]
    if sweep and not levels:
        raise PredictorError(f"this store has no calibrated levels to sweep; {CALIBRATE}")
    if against is not None and approximates(against):
        raise ValueError(f"predictors are held against exact, certified, router or all, not {against!r}")
    wanted = [*(asked or ([] if sweep else ["exact"])), *(levels if sweep else ())]
    if against is None and any(map(approximates, wanted)):
        against = "exact"
    found: dict[str, Choice] = {}
    for name in wanted if against is None else [against, *wanted]:
        choice = choices(manifest, calibration, name, max_ppl_increase)[0]
        if not choice.approximates or choice not in found.values():
            found.setdefault(name, choice)
    return Candidates(against, tuple(name for name in found if name != against))


def approximates(name: str) -> bool:
    """Whether a predictor of that name may be wrong, as `auto` may. Raises ValueError: there is no such name."""
    kind, target = parse_predictor(name)
    return kind in (*APPROXIMATIONS, "auto") or (kind == "router" and bool(target))
