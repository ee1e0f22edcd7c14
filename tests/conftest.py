"""Fixtures of all tests. A test pays only for what it asks for: nothing here starts by itself.

    settings        the configuration of this test process: its own database, key file, directories
    session         a session with an open transaction; commit() what others must see, the rest is rolled back
    client          the API in this process, over HTTP
    worker          a worker in this process; `run_operations()` waits until everything is done
    cloud           a location over simulated engines and a customer; nothing is carried out unless `worker` runs too

Options: `--full` runs the full counts of what is else a sample; `--minutes N` begins no test later than that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from awan.engines.registry import sim_store
from awan.kit.database import dispose_engine, get_engine
from awan.kit.secrets import create_key_file
from awan.runtime.postgres import SUPERUSER
from awan.settings import Settings, get_settings
from tests.support import sampling, time_budget
from tests.support.database_server import DatabaseServer, ServerAddress, empty
from tests.support.database_snapshot import Snapshot
from tests.support.fault_report import pytest_terminal_summary as pytest_terminal_summary
from tests.support.in_process_worker import InProcessWorker, wait_until_idle
from tests.support.simulated_cloud import SimulatedCloud, make_cloud

SERVER_KEY = pytest.StashKey[DatabaseServer]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this test suite."""
    parser.addoption("--full", action="store_true", help="full counts instead of samples")
    parser.addoption("--minutes", type=float, help="begin no test later than this")


def pytest_configure(config: pytest.Config) -> None:
    """Everything or samples, and how long."""
    sampling.set_full(config.getoption("full"))
    time_budget.register(config)


def _start_server(config: pytest.Config) -> str:
    if SERVER_KEY not in config.stash:
        config.stash[SERVER_KEY] = DatabaseServer()
    return config.stash[SERVER_KEY].address


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """With xdist: the controller owns the server and tells each test process where it is."""
    node.workerinput["database_server"] = _start_server(node.config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """The server ends with the run."""
    server = config.stash.get(SERVER_KEY, None)
    if server is not None:
        server.stop()


@pytest.fixture(scope="session")
def database_server(request: pytest.FixtureRequest) -> ServerAddress:
    """Where databases can be made."""
    workerinput = getattr(request.config, "workerinput", None)
    if workerinput is not None:
        return ServerAddress(workerinput["database_server"])
    return ServerAddress(_start_server(request.config))


@pytest.fixture(scope="session")
def _process_settings(
    database_server: ServerAddress, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """The configuration of this test process, in the environment, with a migrated database of its own."""
    worker_id = _process_name(tmp_path_factory)
    state_dir = tmp_path_factory.mktemp("state")
    create_key_file(state_dir / "secret.key")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWAN_DATABASE_URL": database_server.create(f"awan_{worker_id}"),
            "AWAN_STATE_DIR": state_dir,
            "AWAN_SECRET_KEY_FILE": state_dir / "secret.key",
            "AWAN_IMAGE_DIR": state_dir / "images",
            "AWAN_WORKER_ID": f"test-{worker_id}",
            "AWAN_QUEUE_POLLING_S": "0.02",
            "AWAN_LOG_JSON": "false",
        }.items():
            patch.setenv(name, str(value))
        get_settings.cache_clear()
        dispose_engine()
        yield get_settings()
        dispose_engine()
    get_settings.cache_clear()


def _process_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A name of this test process that no other of the run has."""
    base: Path = tmp_path_factory.getbasetemp()
    return base.name.removeprefix("popen-").replace("-", "_") if "popen-" in base.name else "main"


@pytest.fixture
def settings(_process_settings: Settings) -> Iterator[Settings]:
    """The configuration; whatever the test commits to the database is removed afterwards."""
    yield _process_settings
    empty(_process_settings.database_url)
    shutil.rmtree(_process_settings.image_dir, ignore_errors=True)


@pytest.fixture
def session(settings: Settings) -> Iterator[Session]:
    """A session with an open transaction. `commit()` makes rows visible to others; the rest is rolled back."""
    with Session(get_engine(), expire_on_commit=False) as opened:
        yield opened


@pytest.fixture
def worker(settings: Settings) -> Iterator[InProcessWorker]:
    """A running worker with the workflows of all rooms."""
    with InProcessWorker(settings) as running:
        yield running


@pytest.fixture
def run_operations(worker: InProcessWorker) -> Callable[..., None]:
    """`run_operations(timeout_s=20)`: returns when no operation is unfinished, else fails and names them."""
    return wait_until_idle


@pytest.fixture(scope="session")
def _seeded(
    _process_settings: Settings, database_server: ServerAddress
) -> tuple[SimulatedCloud, Snapshot]:
    """A cloud that was set up once through the operator's API, and the rows that make it up."""
    with InProcessWorker(_process_settings):
        cloud = make_cloud()
    with get_engine().connect() as connection:
        database = str(connection.scalar(text("SELECT current_database()")))
    snapshot = Snapshot(database_server.url(database, SUPERUSER))
    empty(_process_settings.database_url)
    return cloud, snapshot


@pytest.fixture
def cloud(_seeded: tuple[SimulatedCloud, Snapshot], settings: Settings) -> SimulatedCloud:
    """Location, tier, template, two nodes and a customer, over simulated engines; no worker.

    Ask for `worker` beside it where operations are to be carried out.
    """
    cloud, snapshot = _seeded
    snapshot.put_back()
    sim_store().faults.clear()
    # Else a latency of the test before is believed for up to a second.
    sim_store().forget_settings()
    return cloud
