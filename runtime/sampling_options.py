"""Sampling beyond greedy and temperature: a step's rows that ask for it, packed on the host, applied on the device.

Rows that ask for nothing are not touched, and a step without any costs nothing. The tokens that penalties look back on
stay on the device, in a table [slots, max_seq_len] made at the first penalty: the host has not seen the newest ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fp8.builder.engine import Limits
from fp8.plugins.sampling.memory import ORDER, TYPICAL, group_rows, penalty_bytes
from fp8.runtime.logits import keep_likely, keep_near_best, keep_typical, penalize
from fp8.runtime.logprobs import LogprobTable, logprob_table
from fp8.runtime.request import Request
from fp8.runtime.scheduler import Row

if TYPE_CHECKING:
    import torch

Choose = Callable[["torch.Tensor"], "torch.Tensor"]  # logits [L, V] -> tokens int32 [L]
PENALTIES = (
    "penalized", "slot", "prompt", "length", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
TRUNCATIONS = ("truncated", "temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class Options:
    """What a step's rows ask for. Numbers below are places among the rows that sample, that is, rows of the logits;
    `arrays` holds them again, with all values, to be uploaded as one."""

    arrays: dict[str, np.ndarray]
    changed: int  # rows whose logits change
    penalized: int  # rows with penalties
    longest: int  # tokens before the next of the longest of them
    truncated: int  # rows of which some tokens may be left out
    ordered: bool  # some row has top_k or top_p
    typical: bool
    logprob_rows: tuple[int, ...]
    logprobs: tuple[tuple[int, int], ...]  # how many likeliest tokens, and how many given ones, each of them wants
    beam_rows: tuple[int, ...]
    candidates: tuple[tuple[int, int], ...]  # how many each beam offers, and 0 given ones


class Drawn(NamedTuple):
    """What a step chose: tokens int32 [L], and of the rows that want them log-probabilities or a beam's candidates."""

    tokens: torch.Tensor
    logprobs: LogprobTable | None = None
    candidates: LogprobTable | None = None


class History:
    """Whose tokens each slot's row of the table on the device holds; kept where steps are scheduled."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Request, int, int]] = {}  # slot -> whose, its preemptions, how many tokens

    def fresh(self, rows: Sequence[Row]) -> list[Request]:
        """The requests among `rows` whose tokens are not in the table: new ones, and those that come back to a slot
        after a preemption; and beams, as their tokens become others. All their tokens are known to the host then.
        The next call takes them as written."""
        fresh = []
        for row in rows:
            request, length = row.request, _length(row)
            if request.search or self._held.get(request.slot) != (request, request.preemptions, length):
                assert length == len(request.tokens), "a request starts with nothing in flight"
                fresh.append(request)
            self._held[request.slot] = (request, request.preemptions, length + 1)
        return fresh


def options_of(rows: Sequence[Row], history: History) -> Options | None:
    """The options of a step's rows; None if the sampling kernel alone will do. Plain data, for any rank to apply."""
    sampling = [row for row in rows if row.samples]
    if all(row.request.params.plain and not _masked(row) for row in sampling):
        return None
    params = [row.request.params for row in sampling]
    stops = [_masked(row) for row in sampling]
    penalized = [i for i, p in enumerate(params) if p.penalizes]
    truncated = [i for i, p in enumerate(params) if p.truncates]
    biases = [(i, t, b) for i, p in enumerate(params) for t, b in p.logit_bias.items()]
    masks = [(i, t) for i, tokens in enumerate(stops) for t in tokens]
    arrays = {
        "bias_row": _int(i for i, _, _ in biases), "bias_token": _int(t for _, t, _ in biases),
        "bias": _float(b for _, _, b in biases), "mask_row": _int(i for i, _ in masks),
        "mask_token": _int(t for _, t in masks), "penalized": _int(penalized), "truncated": _int(truncated),
    }  # fmt: skip
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        arrays[name] = _float(getattr(params[i], name) for i in penalized)
    arrays["slot"] = _int(sampling[i].request.slot for i in penalized)
    arrays["prompt"] = _int(len(sampling[i].request.prompt) for i in penalized)
    arrays["length"] = _int(_length(sampling[i]) for i in penalized)
    for name in ("temperature", "top_p", "min_p", "typical_p"):
        arrays[name] = _float(getattr(params[i], name) for i in truncated)
    arrays["top_k"] = _int(min(params[i].top_k, 2**31 - 1) or 2**31 - 1 for i in truncated)
    fresh = history.fresh([sampling[i] for i in penalized])
    arrays["fresh_slot"] = _int(r.slot for r in fresh)
    arrays["fresh_length"] = _int(len(r.tokens) for r in fresh)
    arrays["fresh"] = np.fromiter((t for r in fresh for t in r.tokens), np.int32)
    listed = [i for i, p in enumerate(params) if p.logprobs is not None]
    arrays["logprob_rows"] = _int(listed)
    asked = [params[i].logprob_token_ids for i in listed]
    beams = [(i, r.request.search.candidates) for i, r in enumerate(sampling) if r.request.search]
    arrays["beam_rows"] = _int(i for i, _ in beams)
    width = max(map(len, asked), default=0)
    arrays["asked"] = _int(t for tokens in asked for t in (*tokens, *[0] * (width - len(tokens))))
    return Options(
        arrays,
        changed=len({*penalized, *truncated, *(i for i, _, _ in biases), *(i for i, _ in masks)}),
        penalized=len(penalized),
        longest=max((_length(sampling[i]) for i in penalized), default=0),
        truncated=len(truncated),
        ordered=any(params[i].top_k or params[i].top_p < 1 for i in truncated),
        typical=any(params[i].typical_p < 1 for i in truncated),
        logprob_rows=tuple(listed),
        logprobs=tuple((params[i].logprobs or 0, len(params[i].logprob_token_ids)) for i in listed),
        beam_rows=tuple(i for i, _ in beams),
        candidates=tuple((k, 0) for _, k in beams),
    )


class OptionSampler:
    """Applies options around the draw, on one device."""

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self._limits, self._device = limits, device
        self._history: torch.Tensor | None = None

    def sample(self, options: Options, logits: torch.Tensor, choose: Choose) -> Drawn:
        """Changes `logits` [L, V] in place and lets `choose` take the tokens. Log-probabilities are those of the logits
        as they came; of beams the candidates are those after the changes, which act on log-probabilities there."""
        on_device = _upload({k: v for k, v in options.arrays.items() if not k.startswith("fresh")}, logits)
        listed = on_device["logprob_rows"]
        log_p = logits.index_select(0, listed).log_softmax(1) if options.logprobs else None
        if options.penalized:
            self._write_history(options.arrays)
        beams, candidates = on_device["beam_rows"], None
        if options.beam_rows:
            logits.index_copy_(0, beams, logits.index_select(0, beams).log_softmax(1))
        if options.changed:
            self._change(options, on_device, logits)
        tokens = choose(logits)
        if options.beam_rows:
            best = tokens.index_select(0, beams)
            candidates = logprob_table(logits.index_select(0, beams), best, options.candidates)
        if options.penalized:
            self._history_table().index_put_(
                (on_device["slot"], on_device["length"]), tokens.index_select(0, on_device["penalized"])
            )
        if log_p is None:
            return Drawn(tokens, None, candidates)
        asked = on_device["asked"].view(len(options.logprobs), -1)
        chosen = tokens.index_select(0, listed)
        return Drawn(tokens, logprob_table(log_p, chosen, options.logprobs, asked), candidates)

    def _change(self, options: Options, on_device: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        import torch

        at, bias = (on_device["bias_row"], on_device["bias_token"]), on_device["bias"]
        logits.index_put_(at, logits[at] + bias)
        if options.penalized:
            scratch = penalty_bytes(options.longest, logits.shape[1])
            for group in _groups(on_device, PENALTIES, options.penalized, scratch):
                self._penalize(options.longest, group, logits)
        at = (on_device["mask_row"], on_device["mask_token"])
        logits.index_put_(at, torch.full_like(on_device["mask_row"], -torch.inf, dtype=logits.dtype))
        if options.truncated:
            scratch = (TYPICAL if options.typical else ORDER) * logits.shape[1]
            for group in _groups(on_device, TRUNCATIONS, options.truncated, scratch):
                self._truncate(options, group, logits)

    def _penalize(self, longest: int, rows: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        history = self._history_table()[:, :longest].index_select(0, rows["slot"])
        changed = penalize(logits.index_select(0, rows["penalized"]), history, *(rows[n] for n in PENALTIES[2:]))
        logits.index_copy_(0, rows["penalized"], changed)

    @staticmethod
    def _truncate(options: Options, rows: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
        import torch

        taken = logits.index_select(0, rows["truncated"])
        scores = taken / rows["temperature"][:, None]
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        if options.ordered:
            scores = keep_likely(scores, rows["top_k"], rows["top_p"])
        scores = keep_near_best(scores, rows["min_p"])
        if options.typical:
            scores = keep_typical(scores, rows["typical_p"])
        logits.index_copy_(0, rows["truncated"], torch.where(scores > -torch.inf, taken, -torch.inf))

    def _write_history(self, arrays: dict[str, np.ndarray]) -> None:
        """Straight into the table: prompts that share their beginning may be long, and many in a step."""
        import torch

        table, tokens, begin = self._history_table(), torch.from_numpy(arrays["fresh"]), 0
        for slot, length in zip(arrays["fresh_slot"].tolist(), arrays["fresh_length"].tolist(), strict=True):
            given = tokens[begin : begin + length]
            table[slot, :length].copy_(given.pin_memory() if table.is_cuda else given, non_blocking=True)
            begin += length

    def _history_table(self) -> torch.Tensor:
        import torch

        if self._history is None:
            shape = (self._limits.max_batch_size, self._limits.max_seq_len)
            self._history = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._history


def _groups(
    on_device: dict[str, torch.Tensor], names: Sequence[str], rows: int, row_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Arrays of one value per row, for as many rows at a time as the scratch is meant for."""
    step = group_rows(row_bytes)
    for begin in range(0, rows, step):
        yield {name: on_device[name][begin : begin + step] for name in names}


def _masked(row: Row) -> Sequence[int]:
    """Tokens that cannot come yet."""
    return sorted(row.request.stop_tokens) if row.index < row.request.params.min_tokens else ()


def _length(row: Row) -> int:
    """Tokens of the row's sequence before the one that it samples."""
    return row.start + row.count


def _int(values: object) -> np.ndarray:
    return np.fromiter(values, np.int64)  # type: ignore[call-overload, no-any-return]


def _float(values: object) -> np.ndarray:
    return np.fromiter(values, np.float32)  # type: ignore[call-overload, no-any-return]


def _upload(arrays: dict[str, np.ndarray], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arrays where `like` is, by one copy. The pinned memory is torch's, which reuses it after the copy only."""
    import torch

    padded = [np.resize(a.view(np.uint8), -(-a.nbytes // 8) * 8) for a in arrays.values()]  # int64 views are aligned
    data = torch.from_numpy(np.concatenate(padded))
    if like.is_cuda:
        data = data.pin_memory().to(like.device, non_blocking=True)
    out, at = {}, 0
    for name, array in arrays.items():
        dtype = getattr(torch, array.dtype.name)
        out[name] = data[at : at + array.nbytes].view(dtype)
        at += -(-array.nbytes // 8) * 8
    return out
