"""Speed, in ratios to a reference timed in the same run: `uv run python -m benchmarks.NAME [--quick]`."""

from saev import early

early.limit_spinning()  # before torch is imported, as in the commands
