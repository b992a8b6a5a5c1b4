"""How much memory there is, on made-up machines."""

import logging

import pytest

from saev import machine

GB = 2**30
FILES = {
    "/proc/meminfo": ["MemTotal:  99 kB", f"MemAvailable:   {12 * 2**20} kB"],
    "/proc/self/cgroup": ["5:cpu,memory:/slurm/job_7/step_0", "4:pids:/x"],
    "/sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": [str(8 * GB)],
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": [str(2**63 - 4096)],
}
V2 = {
    "/proc/self/cgroup": ["0::/system.slice/job_7/step_0"],
    "/sys/fs/cgroup/system.slice/job_7/step_0/memory.max": ["max"],
    "/sys/fs/cgroup/system.slice/job_7/memory.max": [str(4 * GB)],
}


@pytest.mark.parametrize(
    ("files", "want"),
    [
        (FILES, 8 * GB),
        (FILES | V2, 4 * GB),
        (FILES | {"/proc/self/cgroup": ["0::/"]}, 12 * GB),
        (FILES | {"/proc/self/cgroup": ["0::/"], "/sys/fs/cgroup/memory.max": [str(GB)]}, GB),
        ({}, 2**63 - 1),
    ],
)
def test_memory_within_the_limits_of_a_job(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, list[str]], want: int
) -> None:
    monkeypatch.setattr(machine, "_lines", lambda fpath: files.get(str(fpath), []))
    assert machine.free_bytes() == want
    monkeypatch.setattr(
        machine.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 * 2**18}.__getitem__
    )
    assert machine.memory_bytes() == (16 * GB if want >= 12 * GB else want)


def test_a_need_that_is_more_than_there_is_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "saev")
    monkeypatch.setattr(machine, "memory_bytes", lambda: 3 * 10**9)
    machine.log_need(3 * 10**9, " with large photos")
    machine.log_need(3_010_000_000)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "memory: about 3.00 GB with large photos (docs/memory.md)"),
        ("WARNING", "memory: about 3.01 GB, but this job has 3.00 GB (docs/memory.md)"),
    ]
