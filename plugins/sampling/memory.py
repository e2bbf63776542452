"""Device memory that options of sampling take beside the logits, such as penalties and top-p: known when an engine is
built, and kept to when they are applied."""

from __future__ import annotations

GROUP = 1 << 30  # bytes of scratch: of more rows than fit, one group comes after the other
# Bytes of scratch for each token of the vocabulary (for PENALTY of the sequence, too), with what torch's sorts take.
PENALTY, ORDER, TYPICAL = 40, 64, 128


def group_rows(row_bytes: int) -> int:
    """Rows whose options are applied together, of so many bytes of scratch each."""
    return max(1, GROUP // row_bytes)


def penalty_bytes(length: int, vocabulary: int) -> int:
    """Scratch of one row whose penalties look back on so many tokens."""
    return PENALTY * (length + vocabulary)


def option_bytes(rows: int, max_seq_len: int, vocabulary: int, logits_rows: int) -> int:
    """All of it: the table of tokens, which penalties look up, int32 [rows, max_seq_len]; log-probabilities, f32
    [logits_rows, vocabulary] and as much to copy from; and scratch."""
    row = max(penalty_bytes(max_seq_len, vocabulary), TYPICAL * vocabulary)
    return 4 * rows * max_seq_len + 8 * logits_rows * vocabulary + min(rows, group_rows(row)) * row
