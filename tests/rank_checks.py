"""All ranks of a job run many engines, one after the other; rank 0 holds each against the engine of one rank.

    mpirun -n RANKS python rank_checks.py PAIRS.json FOUND.json

PAIRS.json: a list of {name, divided, one, tokens, exact}. FOUND.json: for each name how far the logits are apart, the
two perplexities and the texts. What is `exact` computes in float64 whatever is not e4m3, so that no code flips by the
order of sums: what then differs was quantized differently.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fp8.builder.verify import Exact, exact, float64_by_default, sqnr
from fp8.runtime import step_runner
from fp8.runtime.comm import World
from fp8.runtime.launcher import launched
from fp8.runtime.links import HostLinks
from fp8.runtime.llm import LLM
from fp8.runtime.ranks import stop
from fp8.runtime.reference import ReferenceExecutor
from fp8.runtime.sampling_params import SamplingParams
from fp8.runtime.scoring import token_losses
from fp8.runtime.session import Session
from fp8.scripts.gpu_engines import logits

LENGTHS = (1, 70)
SAMPLED = SamplingParams(max_tokens=5, temperature=0.8, seed=3, repetition_penalty=1.2, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)


class ExactExecutor(ReferenceExecutor):
    """Only what leaves the last stage is float32."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._constants = {name: exact(tensor) for name, tensor in self._constants.items()}

    def run(self, *arguments: Any, **more: Any) -> torch.Tensor:
        with Exact(), float64_by_default():
            out = super().run(*arguments, **more)
        return out.to(torch.float32) if self._result == "logits" else out


class ExactLinks(HostLinks):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._dtype = self._dtype and torch.float64


def open_llm(directory: str, exactly: bool, world: World | None = None) -> LLM:
    use(exactly)
    return LLM(directory, "cpu", 16, world=world)


def use(exactly: bool) -> None:
    step_runner.ReferenceExecutor = ExactExecutor if exactly else ReferenceExecutor  # type: ignore[misc]
    step_runner.HostLinks = ExactLinks if exactly else HostLinks  # type: ignore[misc]


def results(llm: LLM, tokens: list[int]) -> tuple[torch.Tensor, float, list[list[int]]]:
    """Logits of prompts in chunks and of single tokens; perplexity; texts of four prompts, greedy and sampled."""
    found = torch.cat(logits(llm.session, tokens, LENGTHS, 2))
    losses = np.concatenate([token_losses(llm.session, tokens[at : at + 96])[0] for at in (0, 96)])
    params = [GREEDY, SAMPLED, GREEDY, SAMPLED]
    texts = llm.generate([tokens[i * 31 :][: 7 * i + 1] for i in range(4)], params)
    return found, math.exp(losses.mean()), [t.token_ids for t in texts]


@functools.cache
def alone(directory: str, tokens: tuple[int, ...], exactly: bool) -> tuple[torch.Tensor, float, list[list[int]]]:
    return results(open_llm(directory, exactly), list(tokens))


def compare(pair: dict[str, Any], world: World) -> dict[str, Any]:
    tokens, exactly = pair["tokens"], pair["exact"]
    ours = results(open_llm(pair["divided"], exactly, world), tokens)
    theirs = alone(pair["one"], tuple(tokens), exactly)
    return {
        "name": pair["name"], "equal": bool(torch.equal(ours[0], theirs[0])), "sqnr": sqnr(ours[0], theirs[0]),
        "error": float((ours[0] - theirs[0]).norm() / theirs[0].norm()), "perplexity": [ours[1], theirs[1]],
        "texts": [ours[2], theirs[2]],
    }  # fmt: skip


def main() -> None:
    pairs = json.loads(Path(sys.argv[1]).read_text())
    world = World(launched(), 10.0, "rank_checks")
    found = []
    try:
        for pair in pairs:
            if world.rank == 0:
                found.append(compare(pair, world))
                stop(world)
            else:
                use(pair["exact"])
                Session(pair["divided"], "cpu", 16, world=world).follow()
    except BaseException as error:
        world.fail(f"{type(error).__name__}: {error}")
    world.close()
    if world.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
