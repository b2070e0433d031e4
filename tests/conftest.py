"""What holds for every test: no network, one thread for the tiny models, and no browser test that is skipped in CI."""

import os
import pathlib

import pytest

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with a real model and real preferences; tests skip where it is not (CI does not allow that)."""
    if not SHARED.is_dir():
        reason = f"{SHARED.name}/ (a small Llama and preference pairs) is not beside the project"
        if os.environ.get("ALIGNKIT_REQUIRE_SHARED"):
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED
