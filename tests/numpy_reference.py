"""DeepSeek-V4's cache in float64 NumPy, from whole sequences: what entries, keys, tails and windows must hold.

Shares no code with the package and has no state machine: everything is computed from all tokens of a request at once,
so that it cannot share a mistake about what is carried from step to step.
"""

import numpy as np

EMPTY_SCORE = -1e9


def rope(x, angles):
    """RoPE on the trailing 64 channels in interleaved pairs: x [n, width], angles [n, 32]."""
    x = np.array(x, np.float64)
    cos, sin = np.cos(angles), np.sin(angles)
    even, odd = x[:, -64::2].copy(), x[:, -63::2].copy()
    x[:, -64::2], x[:, -63::2] = even * cos - odd * sin, odd * cos + even * sin
    return x


def angles_of(positions, inverse_frequencies):
    """fp32 products, as the model computes them, then float64."""
    return (np.asarray(positions, np.float32)[:, None] * inverse_frequencies.astype(np.float32)).astype(np.float64)


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def softmax_pool(kv, score):
    """[rows, d] each -> [d], a softmax over the rows for every channel."""
    weight = np.exp(score - score.max(0))
    return (weight * kv).sum(0) / weight.sum(0)


def entries(kv, gate, ape, norm_weight, inverse_frequencies, ratio, eps, *, hadamard=False):
    """All entries [n // ratio, d] of a request of n tokens; kv, gate [n, 2d] (ratio 4) or [n, d] (ratio 128)."""
    kv, score = np.asarray(kv, np.float64), scores(gate, ape).astype(np.float64)
    d, count = len(norm_weight), len(kv) // ratio
    pooled = np.zeros((count, d))
    for i in range(count):
        window = slice(ratio * i, ratio * (i + 1))
        rows, row_scores = kv[window, -d:], score[window, -d:]
        if kv.shape[1] == 2 * d and i > 0:
            previous = slice(ratio * (i - 1), ratio * i)
            rows = np.concatenate([kv[previous, :d], rows])
            row_scores = np.concatenate([score[previous, :d], row_scores])
        pooled[i] = softmax_pool(rows, row_scores)
    normalized = rms_norm(pooled, norm_weight.astype(np.float64), eps)
    result = rope(normalized, angles_of(ratio * np.arange(count), inverse_frequencies))
    return result @ hadamard_matrix(d) if hadamard else result


def scores(gate, ape):
    """gate + ape of each token's place in its window, in fp32: gate [n, columns] -> [n, columns]."""
    place = np.arange(len(gate)) % len(ape)
    return np.asarray(gate, np.float32) + ape[place]


def tail(kv, gate, ape, width):
    """The tail [2 (kv, score), rows, width] of a request after all n tokens of kv and gate, cleared rows included."""
    n, ratio = len(kv), len(ape)
    overlap_rows = 8 if kv.shape[1] == 2 * width else 0
    result = np.zeros((2, overlap_rows + ratio, width), np.float32)
    result[1] = EMPTY_SCORE
    score = scores(gate, ape)
    open_window = n // ratio * ratio
    if overlap_rows:
        for position in range(max(open_window - ratio, 0), n):
            result[:, position % 8] = kv[position, :width], score[position, :width]
    for position in range(open_window, n):
        result[:, overlap_rows + position % ratio] = kv[position, -width:], score[position, -width:]
    return result


def hadamard_matrix(n):
    """The orthonormal Hadamard matrix in Sylvester's order."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(n)


def visible(position, ratio):
    """How many entries a query at a position sees; an entry closed by that very token counts."""
    return (position + 1) // ratio


def window_positions(last, rows=128):
    """The positions of the window of a query at `last`, oldest first; negative where there is none."""
    return np.arange(last - rows + 1, last + 1)


def attention(query, keys, sinks):
    """Sink attention of one token: query [heads, 512], keys (= values) [n, 512], sinks [heads] -> [heads, 512]."""
    query, keys, sinks = (np.asarray(x, np.float64) for x in (query, keys, sinks))
    logits = query @ keys.T * keys.shape[1] ** -0.5
    largest = np.maximum(logits.max(1), sinks)[:, None]
    weight = np.exp(logits - largest)
    return weight @ keys / (weight.sum(1, keepdims=True) + np.exp(sinks[:, None] - largest))
