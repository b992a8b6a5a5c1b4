"""Speed, in ratios to a reference timed in the same run: `uv run python -m benchmarks.NAME [--quick]`."""

import saev  # before torch, as in the commands

__all__ = ["saev"]
