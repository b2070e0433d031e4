"""Nothing assumes that models are on the CPU: on a pretended GPU each case gives the numbers that it gives on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretended_gpu import CASES


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-m", "tests.pretended_gpu"], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_case_gives_the_same_numbers_on_a_gpu(case, outcomes):
    assert outcomes[case] == "the same"

