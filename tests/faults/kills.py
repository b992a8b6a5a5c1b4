"""Each command in a process of its own, killed (SIGKILL) at drawn moments, then run to its end: the artefacts must be equal."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing as tp

import forked
import numpy as np

from .chain import Chain, digest
from .outcomes import Tally

SCRIPT = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from faults import chain
c = chain.Chain(pathlib.Path({root!r}))
{call}
"""


class Command(tp.NamedTuple):
    """One command that writes into a folder of its own."""

    name: str
    call: str
    folders: tuple[str, ...]
    """What it writes into."""


COMMANDS = (
    Command("dump", "c.dump('killed')", ("killed",)),
    Command("train", "c.train('killed')", ("killed",)),
    Command("look", "c.look('killed/gallery')", ("killed",)),
    Command("evaluate", "c.evaluate('killed', 'killed-scorers')", ("killed", "killed-scorers")),
)
IMPORTED = ("saev.data.dump", "saev.training.loop", "saev.visuals.collect", "saev.protoeval.run")
LITTER = ("*.tmp", "*.partial", "*.lock", "*.state", "state-*.pt", ".gallery*")


def campaign(tally: Tally, chain: Chain, n_each: int, n_kills: int, seed: int) -> None:
    """n_each times for each command: kill it n_kills times, run it to its end, compare with the undisturbed chain."""
    rng = np.random.default_rng(seed)
    nothing = Command("nothing", "", ())
    _run(chain, nothing)  # starts a server (see `forked`)
    start_s = time.monotonic()
    _run(chain, nothing)
    import_s = time.monotonic() - start_s
    for command in COMMANDS:
        expected = _artefact(chain, command, chain.root)
        for i in range(n_each):
            moments_s = import_s + rng.uniform(-0.1, 1.2, n_kills) * chain.seconds[command.name]
            n_killed = sum(_run(chain, command, kill_after_s=float(s)) for s in moments_s)
            _run(chain, command)
            litter = _litter(chain, command)
            found = _artefact(chain, command, chain.root / "killed")
            story = f"number {i}, killed {n_killed} times; left over: {litter}"
            outcome = "right" if found == expected and not litter else "wrong"
            tally.add("kills", command.name, outcome, story)
            for folder in command.folders:
                shutil.rmtree(chain.root / folder, ignore_errors=True)


def _run(chain: Chain, command: Command, kill_after_s: float | None = None) -> bool:
    """Runs the command; returns whether it was killed.

    Raises:
        AssertionError: it was not killed and failed.
    """
    tests = str(pathlib.Path(__file__).parent.parent)
    script = SCRIPT.format(tests=tests, root=str(chain.root), call=command.call)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    cwd = pathlib.Path(__file__).parents[2]
    with tempfile.TemporaryFile() as log:
        pipes = {"cwd": cwd, "env": env, "stdout": log, "stderr": log, "also": IMPORTED}
        process = forked.Popen([sys.executable, "-c", script], **pipes)
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        log.seek(0)
        assert process.returncode == 0, log.read().decode()[-2000:]
    return False


def _artefact(chain: Chain, command: Command, root: pathlib.Path) -> str:
    """Digest of what the command made below `root`, where the chain's own or the killed commands' outputs lie."""
    is_own = root == chain.root
    if command.name == "dump":
        (metadata,) = (root / "shards" if is_own else root).glob("*/metadata.json")
        return chain.activations(metadata.parent)
    if command.name == "train":
        (ckpt,) = (root / "checkpoints" if is_own else root).glob("*/sae.pt")
        return chain.run_weights(ckpt)
    if command.name == "look":
        return files(root / "gallery")
    (about,) = (root / "results" if is_own else root).glob("*/about.json")
    return chain.table(about.parent)


def files(folder: pathlib.Path) -> str:
    """Names and bytes of all files but code.json, which names the command."""
    fpaths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "code.json")
    return digest([[str(p.relative_to(folder)), p.read_bytes().hex()] for p in fpaths])


def _litter(chain: Chain, command: Command) -> list[str]:
    """Temporary files that the killed processes left and the last one did not sweep."""
    found = [p for folder in command.folders for name in LITTER for p in (chain.root / folder).rglob(name)]
    return sorted({str(p.relative_to(chain.root)) for p in found})
