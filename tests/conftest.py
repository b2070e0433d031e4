"""What holds for every test: no network, one thread for the tiny models, and no browser test that is skipped in CI."""

import os
import pathlib
import socket

import pytest
from jupyter_client.connect import LocalPortCache

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def pytest_runtest_setup(item) -> None:
    """Skip what is marked `shared` where there is no such folder; CI does not allow that."""
    if item.get_closest_marker("shared") and not SHARED.is_dir():
        reason = f"{SHARED.name}/ (a small Llama and preference pairs) is not beside the project"
        if os.environ.get("ALIGNKIT_REQUIRE_SHARED"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with a real model and real preferences. Who uses it is marked `shared`."""
    return SHARED


@pytest.fixture
def take_ports(monkeypatch):
    """take_ports(n): another process takes a port of each of the next n kernels before they start. Returns the list of
    what was asked for meanwhile, five ports a start."""
    ports, asked = LocalPortCache.instance(), []
    free = ports.find_available_port
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def take(starts: int) -> list[str]:
            def port(ip: str) -> int:
                asked.append(ip)
                return other.getsockname()[1] if len(asked) % 5 == 0 and len(asked) <= 5 * starts else free(ip)

            monkeypatch.setattr(ports, "find_available_port", port)
            return asked

        yield take
