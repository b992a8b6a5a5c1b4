"""How much memory there is for a process: within the limits of its job or container, too."""

import collections.abc
import logging
import os
import pathlib
import sys

logger = logging.getLogger("saev")


def log_need(n_bytes: int, note: str = "") -> None:
    """Logs how much memory a stage will need: as a warning if there is less."""
    n_gb, most_gb = n_bytes / 1e9, memory_bytes() / 1e9
    if n_gb > most_gb:
        logger.warning(
            "memory: about %.2f GB%s, but this job has %.2f GB (docs/memory.md)", n_gb, note, most_gb
        )
    else:
        logger.info("memory: about %.2f GB%s (docs/memory.md)", n_gb, note)


def memory_bytes() -> int:
    """Memory that a process can have at most."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def free_bytes() -> int:
    """Memory that this process and its files can take: free or to be freed."""
    free = [
        1024 * int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")
    ]
    return min([*free, *_limits(), sys.maxsize])


def _limits() -> collections.abc.Iterator[int]:
    """Limits of the process's control groups (of Slurm, a container, systemd), in both versions of these."""
    for line in _lines("/proc/self/cgroup"):
        _, kinds, path = line.split(":", 2)
        if not kinds or "memory" in kinds.split(","):
            root, name = ("memory", "memory.limit_in_bytes") if kinds else ("", "memory.max")
            group = pathlib.PurePosixPath(path.removeprefix("/"))
            for folder in (group, *group.parents):
                for limit in _lines(pathlib.Path("/sys/fs/cgroup", root, folder, name)):
                    if limit != "max":
                        yield int(limit)


def _lines(fpath: str | pathlib.Path) -> list[str]:
    """Lines of a file; without such a file, none."""
    try:
        return pathlib.Path(fpath).read_text().splitlines()
    except OSError:
        return []
