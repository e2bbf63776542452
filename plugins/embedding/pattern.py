"""Rows of a stored table."""

from __future__ import annotations


def embedding(op, input_ids, table):
    return op.module(op.Gather(op.constant(table), input_ids, axis=0))
