"""The GPU programs of `triton_select`, which says what they are for, and of `optim`.

Importing this needs Triton. Offsets into pre-activations and weights are int64. Shape letters: as in
`triton_select`, and i candidates, d values of a digit or dimensions of a row.
"""

import inspect

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))
"""The smallest key."""
SIZES = ("S", "G", "n", "K", "shift", "first")
"""Arguments for which no program of its own is compiled."""


def jit(function):
    """Unwraps first: Triton cannot compile the wrappers of a test's import hook."""
    return triton.jit(inspect.unwrap(function))


def jit_any_size(function):
    """Compiles once for numbers of any size, so that loads are of one number per thread.

    Wider loads would have each thread hold neighbours, which scattered writes then move to other threads.
    """
    kernel = inspect.unwrap(function)
    sizes = [name for name in inspect.signature(kernel).parameters if name in SIZES]
    return triton.jit(do_not_specialize=sizes)(kernel)


@jit
def key_of(value):
    """Integers in the order of the floats."""
    value = value.to(tl.float32)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def group_max(source, out, S, G, L: tl.constexpr, TILE: tl.constexpr, IS_KEY: tl.constexpr):
    """Writes the keys of the groups' maxima."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * TILE + tl.arange(0, TILE)
    s = g[:, None] * L + tl.arange(0, L)[None, :]
    key = tl.load(source + row * S + s, mask=s < S, other=LEAST if IS_KEY else float("-inf"))
    if not IS_KEY:
        key = key_of(key)
    tl.store(out + row * G + g, tl.max(key, axis=1), mask=g < G)


@jit_any_size
def select(
    source, group, place, value, S, n, K, L: tl.constexpr, N: tl.constexpr,
    IS_KEY: tl.constexpr,
):  # fmt: skip
    """Writes the places of the row's K largest, in order; of ties, the lowest.

    L = 1: the first n of the source's row, which IS_KEY says are keys. Otherwise the values in n / L
    groups.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, N)
    s = i if L == 1 else tl.load(group + row * (n // L) + i // L, mask=i < n, other=0) * L + i % L
    is_there = (i < n) & (s < S)  # the others come last
    found = tl.load(source + row * S + s, mask=is_there, other=0)
    key = tl.where(is_there, found if IS_KEY else key_of(found), LEAST)
    # the largest bound that at least K keys reach, or any that exactly K reach
    n_reach = tl.sum((key >= 0).to(tl.int32), axis=0)
    bound = tl.where(n_reach >= K, 0, LEAST)
    bit = 30
    while (bit >= 0) & (n_reach != K):
        trial = bound + (1 << bit)
        n_trial = tl.sum((key >= trial).to(tl.int32), axis=0)
        bound = tl.where(n_trial >= K, trial, bound)
        n_reach = tl.where(n_trial >= K, n_trial, n_reach)
        bit -= 1
    is_above = key > bound
    is_tie = key == bound
    n_ties = K - tl.sum(is_above.to(tl.int32), axis=0)
    so_far = tl.cumsum(is_above.to(tl.int32) + (is_tie.to(tl.int32) << 16), axis=0)  # two sums in one
    at = (so_far & 0xFFFF) + tl.minimum(so_far >> 16, n_ties) - 1
    is_kept = is_above | (is_tie & ((so_far >> 16) <= n_ties))
    tl.store(place + row * K + at, s, mask=is_kept)
    if not IS_KEY:
        tl.store(value + row * K + at, found, mask=is_kept)


@jit
def part(size, BLOCK: tl.constexpr):
    """This program's part of `size` places: whole blocks."""
    length = tl.cdiv(tl.cdiv(size, BLOCK), tl.num_programs(0)) * BLOCK
    first = tl.program_id(0) * length
    return first, tl.minimum(first + length, size)


@jit
def values_of(begin, last, pre, listed, S, G, L: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, latents and values of BLOCK listed groups. Latents beyond S and groups beyond `last` have 0."""
    i = begin + tl.arange(0, BLOCK)
    group = tl.load(listed + i, mask=i < last, other=0)
    row = group // G
    s = ((group - row * G) * L)[:, None] + tl.arange(0, L)[None, :]
    is_there = (i < last)[:, None] & (s < S)
    found = tl.load(pre + row.to(tl.int64)[:, None] * S + s, mask=is_there, other=0.0)
    return row, s, found


@jit_any_size
def histogram(
    key_n, size, pre, listed, S, G, state, count, shift, L: tl.constexpr,
    DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts each value of the digit above `shift`, among positive keys with the digits found so far.

    L = 0: of the keys; otherwise of the values in the listed groups. `size` points to their number.
    """
    first, last = part(tl.load(size), BLOCK)
    prefix = tl.load(state)
    total = tl.zeros((DIGITS,), dtype=tl.int32)
    n_others = 0  # among the zeros
    for begin in range(first, last, BLOCK):
        if L == 0:
            i = begin + tl.arange(0, BLOCK)
            key = tl.load(key_n + i, mask=i < last, other=0)
        else:
            found = values_of(begin, last, pre, listed, S, G, L, BLOCK)[2]
            key = tl.reshape(key_of(found), (BLOCK * L,))
        digits = key >> shift
        is_counted = (key > 0) & (digits // DIGITS == prefix)
        total += tl.histogram(tl.where(is_counted, digits % DIGITS, 0), DIGITS)
        n_others += tl.sum((~is_counted).to(tl.int32), axis=0)  # pyrefly: ignore[unsupported-operation]  # tl.sum has a wrong type
    digit = tl.arange(0, DIGITS)
    total -= tl.where(digit == 0, n_others, 0)
    tl.atomic_add(count + digit, total, mask=total > 0)


@jit
def pick(state, count, DIGITS: tl.constexpr):
    """Appends the digit of the n-th largest to state[0], and lowers n = state[1] by the larger ones.

    If there are fewer than n positive keys, all digits are 0.
    """
    digit = tl.arange(0, DIGITS)
    count_d = tl.load(count + digit)
    n = tl.load(state + 1)
    at_least_d = tl.cumsum(count_d, axis=0, reverse=True)
    found = tl.maximum(tl.sum((at_least_d >= n).to(tl.int32), axis=0), 1) - 1
    tl.store(state, tl.load(state) * DIGITS + found)
    tl.store(state + 1, n - tl.sum(tl.where(digit > found, count_d, 0), axis=0))
    tl.store(count + digit, tl.zeros_like(count_d))


@jit_any_size
def reach(
    key_n, size, pre, listed, S, G, bound, end, place, latent, value, L: tl.constexpr,
    BLOCK: tl.constexpr, IS_COUNT: tl.constexpr,
):  # fmt: skip
    """Counts, or writes in order, the positive keys (L = 0) or values that reach the bound.

    Counts go to `end`, whose sums up to each program say where that program's writes end.
    """
    first, last = part(tl.load(size), BLOCK)
    least = tl.maximum(tl.load(bound), 1)
    p = tl.program_id(0)
    n = 0 if IS_COUNT else tl.load(end + p - 1, mask=p > 0, other=0)
    for begin in range(first, last, BLOCK):
        if L == 0:
            i = begin + tl.arange(0, BLOCK)
            is_kept = (tl.load(key_n + i, mask=i < last, other=0) >= least).to(tl.int32)
            if not IS_COUNT:
                at = n + tl.cumsum(is_kept, axis=0) - 1
                tl.store(place + at, i, mask=is_kept > 0)
            n += tl.sum(is_kept, axis=0)  # pyrefly: ignore[unsupported-operation]  # tl.sum has a wrong type
        else:
            row, s, found = values_of(begin, last, pre, listed, S, G, L, BLOCK)
            is_kept = (key_of(found) >= least).to(tl.int32)
            n_kept = tl.sum(is_kept, axis=1)
            if not IS_COUNT:
                before = n + tl.cumsum(n_kept, axis=0) - n_kept
                at = before[:, None] + tl.cumsum(is_kept, axis=1) - 1
                tl.store(place + at, tl.broadcast_to(row[:, None], s.shape), mask=is_kept > 0)
                tl.store(latent + at, s, mask=is_kept > 0)
                tl.store(value + at, found, mask=is_kept > 0)
            n += tl.sum(n_kept, axis=0)  # pyrefly: ignore[unsupported-operation]  # tl.sum has a wrong type
    if IS_COUNT:
        tl.store(end + p, n)


@jit_any_size
def merge(
    listed, size, key, value, place, pre, out_key, out_value, out_place, n, S, G, first,
    L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies the listed groups' keys, values and numbers, at most n groups.

    Positions below n are groups found so far; the others are groups of `pre`, the first of which has the
    number `first`. Latents beyond S have 0.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = i < tl.minimum(tl.load(size), n)
    p = tl.load(listed + i, mask=is_there, other=0)
    is_old = p < n
    group = tl.where(is_old, 0, p - n)
    row = group // G
    j = tl.arange(0, L)
    s = ((group - row * G) * L)[:, None] + j[None, :]
    old = tl.load(value + p.to(tl.int64)[:, None] * L + j, mask=(is_there & is_old)[:, None], other=0.0)
    is_new = (is_there & (p >= n))[:, None] & (s < S)
    new = tl.load(pre + row.to(tl.int64)[:, None] * S + s, mask=is_new, other=0.0)
    at = i.to(tl.int64)[:, None] * L + j[None, :]
    tl.store(out_value + at, tl.where(is_old[:, None], old, new), mask=is_there[:, None])
    number = tl.load(place + p, mask=is_there & is_old, other=0)
    tl.store(out_place + i, tl.where(is_old, number, first + group), mask=is_there)
    tl.store(out_key + i, tl.load(key + p, mask=is_there, other=0), mask=is_there)


@jit
def row_dots(w, g, along, square, D, BLOCK: tl.constexpr):
    """Writes a row's g . w, and the squared norm of g - (g . w) w."""
    row = tl.program_id(0).to(tl.int64)
    gw = tl.zeros((BLOCK,), dtype=tl.float32)
    gg = tl.zeros((BLOCK,), dtype=tl.float32)
    ww = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        w_d = tl.load(w + row * D + d, mask=d < D, other=0.0)
        g_d = tl.load(g + row * D + d, mask=d < D, other=0.0)
        gw += g_d * w_d
        gg += g_d * g_d
        ww += w_d * w_d
    dot = tl.sum(gw, axis=0)
    tl.store(along + row, dot)
    rest = gg + dot * (dot * ww - 2 * gw)
    tl.store(square + row, tl.sum(rest, axis=0))


@jit
def adam_rows(
    w, g, m, v, along, clip, step, correction, D, IS_UNIT: tl.constexpr, BETA1: tl.constexpr,
    BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`kernels.adam_rows` on one row. IS_UNIT: removes the gradient along the row, and normalises."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(clip)
    dot = tl.load(along + row) if IS_UNIT else 0.0
    norm2 = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        at = row * D + d
        w_d = tl.load(w + at, mask=d < D, other=0.0)
        g_d = factor * (tl.load(g + at, mask=d < D, other=0.0) - dot * w_d)
        m_d = BETA1 * tl.load(m + at, mask=d < D, other=0.0) + (1 - BETA1) * g_d
        v_d = BETA2 * tl.load(v + at, mask=d < D, other=0.0) + (1 - BETA2) * g_d * g_d
        w_d -= step * tl.div_rn(m_d, tl.sqrt_rn(v_d) * correction + EPS)
        tl.store(m + at, m_d, mask=d < D)
        tl.store(v + at, v_d, mask=d < D)
        tl.store(w + at, w_d, mask=d < D)
        norm2 += w_d * w_d
    if IS_UNIT:
        norm = tl.maximum(tl.sqrt_rn(tl.sum(norm2, axis=0)), 1e-8)
        for begin in range(0, D, BLOCK):  # the same threads' numbers, from the cache
            d = begin + tl.arange(0, BLOCK)
            w_d = tl.load(w + row * D + d, mask=d < D, other=0.0)
            tl.store(w + row * D + d, tl.div_rn(w_d, norm), mask=d < D)
