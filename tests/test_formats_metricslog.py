"""A line of metrics.jsonl that is damaged is seen."""

import json
import math

from saev.formats import metricslog


def test_a_line_comes_back_and_is_plain_json() -> None:
    metrics = {"step": 3, "loss": 0.1, "l0": 1e-9, "dead_pct": 0, "ev": math.nan}
    text = metricslog.line(metrics)
    assert "\n" not in text
    assert metricslog.parse(text) == {**metrics, "ev": None}
    assert {**json.loads(text), "xxh3_128": 0} == {**metrics, "ev": None, "xxh3_128": 0}


def test_every_flipped_bit_and_every_cut_is_seen() -> None:
    text = metricslog.line({"step": 12, "loss": 0.25, "mse": 1.5e-3, "tokens_per_s": None}).encode()
    want = metricslog.parse(text)
    for bit in range(8 * len(text)):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        assert metricslog.parse(bytes(damaged)) in (None, want), bit
    assert all(metricslog.parse(text[:n]) is None for n in range(len(text)))


def test_lines_of_older_versions_are_read() -> None:
    assert metricslog.parse('{"step": 3, "loss": 0.5, "ev": null}') == {"step": 3, "loss": 0.5, "ev": None}
    assert metricslog.parse('{"step": 3, "xxh3_127": "0"}') is None
    assert metricslog.parse("[1]") is None and metricslog.parse("[" * 100_000) is None
