"""Which levels are tried, and which is used when nobody says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from flashinfer.store import Level
from flashinfer.tune.calibrate import REFINED, _Judging, choose
from flashinfer.tune.options import Options
from flashinfer.tune.trial import untried


class TestRefining:
    """Thresholds between the levels, for the perplexity that is allowed."""

    def refined(self, targets: tuple[float, ...], cost: Any, allowed: float = 0.01) -> tuple[list[Level], list[Level]]:
        """Levels of these densities, and those found between them; `cost` is of a sparsity."""

        def judged(level: Level) -> Level:
            return msgspec.structs.replace(
                level, density=level.target, exact_perplexity=10.0, perplexity=10.0 * (1.0 + cost(1.0 - level.target))
            )

        def level_at(density: float) -> Level:
            return untried("threshold", density, (1.0, 1.0), 1.0, density)

        judging: Any = object.__new__(_Judging)
        judging._exact, judging.level = 10.0, judged
        judging._job = SimpleNamespace(options=Options(max_ppl_increase=allowed))
        levels = [judged(level_at(t)) for t in targets]
        found = judging.refined(levels, SimpleNamespace(level_at=level_at))
        return levels, found

    @pytest.mark.parametrize("power", [2, 3, 4])
    @pytest.mark.parametrize("allowed", [0.003, 0.01, 0.1])
    def test_it_comes_close_to_what_is_allowed(self, power: int, allowed: float) -> None:
        levels, found = self.refined((0.7, 0.6, 0.5, 0.4, 0.3), lambda s: 0.5 * s**power, allowed)
        true = 1.0 - (allowed / 0.5) ** (1 / power)
        every = [*levels, *found]
        chosen = every[choose(every, Options(max_ppl_increase=allowed))]
        assert chosen.perplexity <= 10.0 * (1 + allowed)
        assert chosen.target == pytest.approx(max(true, 0.3), abs=0.03)
        assert len(found) <= REFINED + 1
        assert len({level.target for level in every}) == len(every)

    def test_nothing_is_left_to_find(self) -> None:
        assert self.refined((0.7, 0.3), lambda s: 0.001)[1] == []
        assert self.refined((0.7, 0.3), lambda s: 1.0 * s, allowed=0.0)[1] == []

    def test_where_nothing_may_be_left_out(self) -> None:
        """Then the least harm is done."""
        levels, found = self.refined((0.7, 0.3), lambda s: s)
        assert [level.target for level in found] == [0.98]
        assert choose([*levels, *found], Options()) == 2

    @pytest.mark.parametrize("targets", [(0.99, 0.97), (0.999, 0.5), (0.9995, 0.9)])
    def test_no_level_twice(self, targets: tuple[float, ...]) -> None:
        levels, found = self.refined(targets, lambda s: 0.0 if s < 0.0012 else 0.02)
        every = [level.target for level in (*levels, *found)]
        assert len(set(every)) == len(every)
        assert all(targets[1] <= t <= 1.0 for t in every)


class TestChoosing:
    def levels(self, predictor: str, *rows: tuple[float, float, float]) -> list[Level]:
        return [Level(predictor, t, (1.0,), 0.9, d, p, 10.0) for t, d, p in rows]  # type: ignore[arg-type]

    def test_low_rank_by_recall(self) -> None:
        levels = self.levels("low-rank", (0.9, 0.2, 11.0), (0.95, 0.3, 10.5), (0.99, 0.5, 10.0))
        assert choose(levels, Options(recall=0.95)) == 1
        assert choose(levels, Options(recall=0.9, density=0.5)) == 0

    def test_thresholds_by_density_or_by_perplexity(self) -> None:
        levels = self.levels("threshold", (0.7, 0.7, 10.05), (0.5, 0.5, 10.09), (0.3, 0.3, 12.0))
        assert choose(levels, Options()) == 1
        assert choose(levels, Options(max_ppl_increase=0.3)) == 2
        assert choose(levels, Options(max_ppl_increase=0.001)) == 0
        assert choose(levels, Options(density=0.3)) == 2
