"""An engine as a model of lm-evaluation-harness: `lm_eval --model fp8-engine --model_args engine_dir=...,device=cpu`.

lm-eval finds it by the entry point in pyproject.toml (group `lm_eval.models`); release 0.4.13, which does not look for
entry points yet, is started through `fp8-lm-eval`, which takes the same arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from fp8.runtime.llm import LLM, sample_seed
from fp8.runtime.request import RequestError, SamplingParams
from fp8.runtime.scoring import score_continuations
from fp8.scripts.run import ERRORS

MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call it; first wins
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "seed")
Scored = tuple[Any, list[int], list[int]]  # (key for the cache, context, continuation)


class Fp8Engine(TemplateLM):
    """Arguments: `engine_dir`; `device`, `max_kv_blocks`, `kv_cache_free_gpu_memory_fraction` as fp8-run's;
    `max_gen_toks` for tasks that set no limit; `add_bos_token` (default: as the tokenizer does). `batch_size` changes
    nothing: as many sequences run together as the engine has room for.
    """

    def __init__(
        self,
        engine_dir: str,
        device: str = "auto",
        max_kv_blocks: int | None = None,
        kv_cache_free_gpu_memory_fraction: float = 0.9,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        from transformers import AutoTokenizer

        super().__init__()
        self.llm = LLM(engine_dir, device, max_kv_blocks, kv_cache_free_gpu_memory_fraction)
        self.tokenizer = AutoTokenizer.from_pretrained(engine_dir, local_files_only=True)
        if self.tokenizer.eos_token_id is None:
            raise RequestError(f"{engine_dir}: the tokenizer names no eos_token; add it to tokenizer_config.json")
        self.max_length = min(self.llm.session.limits.max_seq_len, self.llm.session.max_kv_tokens)
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
        self.batch_size = batch_size  # for lm-eval's report
        self._device = self.llm.session.device

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Fp8Engine:
        """lm-eval's own flags go after --model_args; its default device, cuda:0, means none was named."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if flags.get("device") == "cuda:0" and "device" not in arg_dict:
            flags["device"] = "auto"
        return cls(**{**flags, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Fp8Engine:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for the context where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Special tokens as asked for; else as `add_bos_token` says or the tokenizer does, but never a second BOS."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(str(self.tokenizer.decode([self.prefix_token_id]))):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer(string, verbose=False, **options, **kwargs)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [cut(context, continuation, self.max_length) for _, context, continuation in requests]
        with bar("Running loglikelihood requests", len(pairs), disable_tqdm) as advance:
            scores = [(s.logprob, s.greedy) for s in score_continuations(self.llm, pairs, advance)]
        for (key, _, _), score in zip(requests, scores, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Every token of a text is predicted once, after a full context where there is one."""
        texts = [request.args[0] for request in requests]
        windows = [list(self._rolling(text)) for text in texts]
        flat: list[Scored] = [(None, *window) for each in windows for window in each]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm))
        sums = [sum(next(scores)[0] for _ in each) for each in windows]
        for text, value in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return sums

    def _rolling(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        # A window's context and continuation are max_length tokens together, the last of them predicted only.
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
        return map(make_disjoint_window, windows)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for i, (context, options) in enumerate(request.args for request in requests):
            chosen = sampling_params(options, self.max_gen_toks, sample_seed(0, i))
            room = self.max_length - chosen.max_tokens
            if room < 1:
                raise RequestError(
                    f"max_gen_toks is {chosen.max_tokens}, and the engine holds {self.max_length} tokens of a sequence"
                )
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            params.append(chosen)
        with bar("Running generate_until requests", len(prompts), disable_tqdm) as advance:
            completions = self.llm.generate(prompts, params, lambda r: advance(1) if r.finish_reason else None)
        texts = [completion.text or "" for completion in completions]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def cut(context: Sequence[int], continuation: Sequence[int], longest: int) -> tuple[list[int], list[int]]:
    """The end of a sequence that the engine holds; of a continuation longer than that, all but its first tokens are the
    continuation still."""
    over = max(len(context) + len(continuation) - longest, 0)
    if over < len(context):
        return list(context[over:]), list(continuation)
    over -= len(context)
    return list(continuation[over : over + 1]), list(continuation[over + 1 :])


def sampling_params(options: dict[str, Any], max_gen_toks: int, seed: int) -> SamplingParams:
    """The parameters that a task's generation_kwargs ask for. Raises RequestError for an unknown one, as it would
    change the text."""
    rest = dict(options)
    until = rest.pop("until", None) or []
    limits = [rest.pop(name) for name in MAX_TOKENS if name in rest]
    sampled = rest.pop("do_sample", None)
    values = {name: rest.pop(name) for name in SAMPLING if rest.get(name) is not None}
    unknown = sorted(name for name, value in rest.items() if value is not None)
    if unknown:
        raise RequestError(f"generation_kwargs has {unknown[0]}; known are until, do_sample, {', '.join(SAMPLING)}")
    if sampled is False:
        values["temperature"] = 0.0
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    limit = int(next((value for value in limits if value is not None), max_gen_toks))
    return SamplingParams(max_tokens=limit, stop=stop, **{"seed": seed, **values})


@contextmanager
def bar(title: str, total: int, disable: bool) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, desc=title, disable=disable) as shown:
        yield lambda count: shown.update(count) and None


def register() -> None:
    """Makes the name known to a release of lm-eval that does not look for entry points itself."""
    import lm_eval.models  # noqa: F401 (its own models, which it adds only to a registry that is empty)

    if "fp8-engine" not in model_registry:
        register_model("fp8-engine")(Fp8Engine)


def main() -> int:
    """lm-eval's own command line, with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    register()
    try:
        cli_evaluate()
    except ERRORS as error:
        print(f"fp8-lm-eval: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
