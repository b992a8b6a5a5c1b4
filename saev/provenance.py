"""Which code is running: its Git commit, and copies of it for jobs that start later."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import beartype
import msgspec

from saev import helpers
from saev.formats import jsonfile

PACKAGE = pathlib.Path(__file__).parent
NAME = "code.json"
"""Name of the file that tells the code: beside a result, and beside a copy of the package."""


command: list[str] = []
"""The command that made a result, if another process submitted it to this one."""


class Code(msgspec.Struct, frozen=True):
    """A state of saev's code."""

    commit: str
    """Git commit. Empty: the code is not in a Git repository."""
    is_changed: bool
    """Whether tracked files differ from the commit, or the package has untracked ones."""
    digest: str
    """Hash of the package's files."""


@functools.cache
def code() -> Code:
    """The running code, as it was when first asked for."""
    fpath = PACKAGE.parent / NAME
    if fpath.exists():
        return jsonfile.read(fpath, Code, "Submit the job again.")
    return Code(
        commit=_git("rev-parse", "HEAD"),
        is_changed=bool(_git("status", "--porcelain", "--untracked-files=no"))
        or bool(_git("status", "--porcelain", "--", ".")),
        digest=_digest(),
    )


def record() -> dict[str, object]:
    """What is noted beside a result: the code, the Slurm job's id (if any), the command, and its folder."""
    return {
        "commit": code().commit,
        "is_changed": code().is_changed,
        "job": job_id(),
        "command": command or sys.argv,
        "folder": os.getcwd(),  # noqa: PTH109 (as text)
    }


def write(dpath: pathlib.Path) -> None:
    """Notes the code beside a result, in code.json, unless an earlier job did."""
    if not (dpath / NAME).exists():
        helpers.write_text(dpath / NAME, json.dumps(record(), indent=4))


def job_id() -> str:
    """The Slurm job that this process is a task of: 24, or 24_3 in an array. Empty outside jobs."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID", "") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


@beartype.beartype
def copy(folder: pathlib.Path) -> pathlib.Path:
    """Copies the package to <folder>/<hash>/saev, unless it is there, and returns <folder>/<hash>.

    File times are kept, so that Python's and numba's compiled files, which are copied too, stay valid.
    """
    dpath = folder / helpers.hash_of(msgspec.structs.asdict(code()))[:12]
    if not dpath.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with helpers.atomic_folder(dpath) as tmp_dpath:
            shutil.copytree(PACKAGE, tmp_dpath / PACKAGE.name, ignore=shutil.ignore_patterns("*.tmp*"))
            helpers.write_text(tmp_dpath / NAME, jsonfile.dumps(code(), indent=4))
    return dpath


def _git(*args: str) -> str:
    """What Git prints about saev's code; "" without Git or a repository."""
    try:
        command = ["git", "-C", str(PACKAGE), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _digest() -> str:
    total = hashlib.sha256()
    for fpath in sorted(PACKAGE.rglob("*.py")):
        data = fpath.read_bytes()
        total.update(f"{fpath.relative_to(PACKAGE)}\0{len(data)}\0".encode() + data)
    return total.hexdigest()
