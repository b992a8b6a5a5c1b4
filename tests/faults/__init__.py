"""A campaign of faults against the whole chain: flipped bits, crafted files, kills.

    uv run python -m faults.campaign          the quick part, which the tests run too
    uv run python -m faults.campaign --all    everything, in hours

Each attempt damages one thing, runs the commands that read it, and sorts what happens: *right* (the same result as of
undamaged files), *refused* (a one-line error), *wrong* (another result, and no error), *traceback*, or *hang*.
"""
