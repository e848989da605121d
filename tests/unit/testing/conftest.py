from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir(repository: Path) -> Path:
    """The golden vectors beside the repository."""
    directory = repository.parent / "shared" / "golden"
    if not directory.is_dir():
        pytest.skip(f"no golden vectors at {directory}")
    return directory
