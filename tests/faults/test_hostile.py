"""Hostile files are refused and run no code; `scripts/test.sh --full` tries all of them."""

import pytest

from tests.faults.hostile import CASES, CORE
from tests.faults.hostile.case import judge


@pytest.mark.parametrize("name", sorted(CORE))
def test_hostile_file_is_refused_or_harmless(tmp_path, name):
    ended, problems = judge(CASES[name], tmp_path / "case")
    assert not problems, f"{problems}\n{ended.err[-3000:]}"
