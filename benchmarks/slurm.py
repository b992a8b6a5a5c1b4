"""How long a sweep takes to reach Slurm: 200 values of lr, one SAE a job.

    uv run python -m benchmarks.slurm [--account test] [--partition debug]

Ratios to a reference in the same run. --dry-run: to the start of Python with tyro imported. Submission: to a plain
`sbatch --array=0-199` of an empty script. Needs a Slurm (tests/slurm/up), except for --dry-run. The jobs are held
(`--slurm-extra hold`) and cancelled.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
N = 200


def seconds(command: list[str], ids: list[str] | None = None) -> float:
    """Least of three times, in a process of its own. ids: gets the ids of the jobs that it submits."""
    times = []
    for i in range(3):
        start_s = time.perf_counter()
        done = subprocess.run(
            [word.replace("{i}", str(i)) for word in command], cwd=ROOT, capture_output=True, text=True
        )
        times.append(time.perf_counter() - start_s)
        assert done.returncode == 0, done.stderr
        if ids is not None:
            ids += re.findall(r"(?:batch job|scancel) (\d+)", done.stdout + done.stderr)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--account", default="test")
    parser.add_argument("--partition", default="debug")
    args = parser.parse_args()
    where = [f"--account={args.account}", f"--partition={args.partition}"]
    with tempfile.TemporaryDirectory() as folder:
        sweep = pathlib.Path(folder) / "lr.toml"
        sweep.write_text(f"lr = {[1e-5 * (i + 1) for i in range(N)]}\n")
        train = [sys.executable, "train.py", "--sweep", str(sweep), "--max-per-job", "1"]
        train += ["--slurm-acct", args.account, "--slurm-partition", args.partition, "--n-gpus", "0"]
        start_s = seconds([sys.executable, "-c", "import tyro"])
        dry_s = seconds([*train, "--dry-run"])
        print(
            f"--dry-run of {N}: {dry_s:.2f} s, {dry_s / start_s:.1f} x the import of tyro ({start_s:.2f} s)"
        )
        if shutil.which("sbatch") is None:
            print("no sbatch here: submission was not timed")
            return
        ids: list[str] = []
        try:
            plain = ["sbatch", *where, f"--array=0-{N - 1}", "--hold", f"--output={folder}/%j", "--wrap=true"]
            plain_s = seconds(plain, ids)
            logs = ["--log-to", f"{folder}/logs{{i}}", "--no-slurm-wait", "--slurm-extra", "hold"]
            submit_s = seconds([*train, *logs], ids)
        finally:
            subprocess.run(["scancel", *ids], check=True)
        ratio = submit_s / plain_s
        print(f"submission of {N} jobs: {submit_s:.2f} s, {ratio:.0f} x plain sbatch ({plain_s:.3f} s)")


if __name__ == "__main__":
    main()
