"""Rollouts and training overlap by at most `loop.max_lag` updates; at 0 a run has its old figures, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_figures import CASES, figures

STORED = json.loads((Path(__file__).parent / "toy_figures.json").read_text())


@pytest.mark.parametrize("case", CASES)
async def test_without_lag_a_run_has_the_figures_of_before_bit_for_bit(case: str) -> None:
    assert json.loads(json.dumps(await figures(case))) == STORED[case]
