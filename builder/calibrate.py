"""Calibration: text through the model, layer by layer -> the largest magnitude of every observed tensor.

One layer is resident at a time. Hidden states wait in a file, which together with the amaxes found so far is the state
that an interrupted calibration continues from:

    calibration.json     fingerprint of the inputs, number of finished layers, amax by scale name
    hidden.{i}.bin       DT [tokens, H]: what layer i reads
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fp8.builder.calibration_text import CalibrationError
from fp8.builder.graph import Graph
from fp8.builder.interpret import Interpreter, to_torch

STATE = "calibration.json"
# Tokens in flight. A batch attends over itself, so a larger one wastes work in attention; a GPU needs it to be busy.
BATCH_TOKENS = {"cpu": 512, "cuda": 4096}


class NonFiniteError(CalibrationError):
    """An activation contains NaN or Inf."""


Progress = Callable[[int, int], None]  # done, total


class LayerEmitter(Protocol):
    """Emits the graph of some consecutive layers: unquantized, or as another tool has quantized them."""

    def __call__(self, layers: range) -> Graph: ...


@dataclass
class State:
    """What is known so far, kept in `directory`."""

    directory: Path
    fingerprint: str
    finished: int = 0
    amax: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def stored(directory: Path) -> State | None:
        """What an earlier calibration left, if it finished a layer."""
        try:
            stored = json.loads((directory / STATE).read_text())
            return State(directory, stored["fingerprint"], stored["finished"], stored["amax"])
        except (OSError, ValueError, KeyError):
            return None

    @staticmethod
    def open(directory: Path, fingerprint: str) -> State:
        """The stored state if it is of the same inputs, else a new one."""
        state = State.stored(directory)
        return state if state is not None and state.fingerprint == fingerprint else State(directory, fingerprint)

    def hidden(self, layer: int) -> Path:
        return self.directory / f"hidden.{layer}.bin"

    def finish_layer(self, amax: dict[str, float]) -> None:
        self.amax.update(amax)
        self.finished += 1
        temporary = self.directory / f"{STATE}.new"
        content = {"fingerprint": self.fingerprint, "finished": self.finished, "amax": self.amax}
        temporary.write_text(json.dumps(content))
        os.replace(temporary, self.directory / STATE)
        self.hidden(self.finished - 1).unlink(missing_ok=True)

    @property
    def files(self) -> tuple[Path, ...]:
        """What a later calibration continues from."""
        return self.directory / STATE, self.hidden(self.finished)


def calibrate(
    emit: LayerEmitter, num_layers: int, samples: Sequence[list[int]], wanted: Callable[[str], bool], state: State,
    device: str, progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """amax of the activations of all wanted scales, by the scale's name. Raises NonFiniteError."""
    batches = _batches(samples, BATCH_TOKENS[torch.device(device).type])
    for layer in range(state.finished, num_layers):
        graph = emit(range(layer, layer + 1))
        found = {scale: tensor for scale, tensor in graph.activations.items() if wanted(scale)}
        amax = _run_layer(graph, found, batches, state, layer, num_layers, device, progress)
        state.finish_layer({scale: amax[tensor] for scale, tensor in found.items()})
    return state.amax


def _run_layer(
    graph: Graph, wanted: dict[str, str], batches: Sequence[Sequence[list[int]]], state: State, layer: int,
    num_layers: int, device: str, progress: Progress,
) -> dict[str, float]:  # fmt: skip
    interpreter = Interpreter(graph, device)
    observed = list(dict.fromkeys(wanted.values()))
    passes_on = layer + 1 < num_layers
    total = sum(len(sample) for batch in batches for sample in batch)
    amax = dict.fromkeys(observed, 0.0)
    source = _open_hidden(graph, state.hidden(layer), total) if layer else None
    row = 0
    with open(state.hidden(layer + 1) if passes_on else os.devnull, "wb") as sink:
        for batch in batches:
            feeds = _feeds(graph, batch)
            rows = len(feeds["position_ids"])
            if source is not None:
                feeds["hidden_states"] = to_torch(source[row : row + rows])
            results = interpreter(feeds, outputs=[*observed, "hidden_states.out"] if passes_on else observed)
            for name in observed:
                amax[name] = max(amax[name], _amax(results[name], name))
            if passes_on:
                sink.write(_bytes(results["hidden_states.out"]))
            row += rows
            progress(layer * total + row, num_layers * total)
    return amax


def _amax(x: torch.Tensor, name: str) -> float:
    low, high = torch.aminmax(x)
    value = max(-low.item(), high.item())
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise NonFiniteError(
            f"activation {name} contains NaN or Inf; the unquantized model overflows (try --dtype bfloat16) "
            "or its weights are damaged"
        )
    return value


def _bytes(x: torch.Tensor) -> memoryview:
    return memoryview(x.cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _open_hidden(graph: Graph, path: Path, tokens: int) -> np.ndarray:
    tensor = next(t for t in graph.inputs if t.name == "hidden_states")
    shape, dtype = (tokens, tensor.shape[1]), np.dtype(tensor.dtype)
    if not path.is_file() or path.stat().st_size != math.prod(shape) * dtype.itemsize:
        raise CalibrationError(f"{path} is damaged; run again to start anew")
    return np.memmap(path, np.uint8, "r").view(dtype).reshape(shape)


def _batches(samples: Sequence[list[int]], tokens: int) -> list[list[list[int]]]:
    """Consecutive samples packed up to `tokens`; a longer sample is a batch of its own."""
    batches: list[list[list[int]]] = []
    room = 0
    for sample in samples:
        if not batches or len(sample) > room:
            batches.append([])
            room = tokens
        batches[-1].append(sample)
        room -= len(sample)
    return batches


def _feeds(graph: Graph, batch: Sequence[list[int]]) -> dict[str, torch.Tensor]:
    """A prefill of whole samples, where slot t holds token t."""
    lengths = torch.tensor([len(sample) for sample in batch])
    sequences = torch.repeat_interleave(torch.arange(len(batch)), lengths).int()
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).int()
    feeds = {
        "input_ids": torch.tensor([t for sample in batch for t in sample], dtype=torch.int32),
        "position_ids": positions,
        "sequence_ids": sequences,
        "slot_mapping": torch.arange(len(positions), dtype=torch.int32),
        "slot_sequence_ids": sequences,
        "slot_position_ids": positions,
    }
    for tensor in graph.inputs:
        if tensor.name.startswith("kv_cache."):
            feeds[tensor.name] = torch.zeros(len(positions), *tensor.shape[1:])
    return feeds
