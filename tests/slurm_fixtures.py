"""The fixture of tests on a real Slurm: `pytest_plugins = ["slurm_fixtures"]`."""

import pathlib

import pytest
from slurm_cluster import TASKS

from saev import launch
from saev.launch import watch


@pytest.fixture
def slurm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> launch.SlurmConfig:
    """Commands in the test's own process wait less: one machine needs no 10 s for a file or a requeued job to appear."""
    monkeypatch.setattr(watch, "GRACE_S", 3.0)
    monkeypatch.setattr(watch, "MAX_DELAY_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(TASKS))  # Slurm passes the environment on to the job
    monkeypatch.syspath_prepend(str(TASKS))
    return launch.SlurmConfig(
        "test", "nextgen", n_hours=0.2, n_cpus=2, n_gpus=0, log_to=str(tmp_path / "logs")
    )
