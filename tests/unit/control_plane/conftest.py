"""A ledger of four prompts in a SQLite file; a module whose tests want another ``store`` has its own."""

import pytest

from specforge.control_plane.metadata.sql import SqlMetadataStore
from specforge.testing.metadata_store import make_task


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def store(path):
    store = SqlMetadataStore(path)
    store.register([make_task(i) for i in range(4)])
    yield store
    store.close()
