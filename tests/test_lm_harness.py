"""The model class of lm-evaluation-harness: a local task on the example, against lm-eval's own `hf` in float32."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import evaluation_data
import pytest

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import Registry, get_model, model_registry
from lm_eval.tasks import TaskManager

from fp8.runtime.request import RequestError
from fp8.scripts.lm_harness import Fp8Engine, cut, main, register, sampling_params

MODEL = evaluation_data.MODEL
TASKS = {
    "next_line": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rest_of_line": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: bits_per_byte}]
""",
}
ITEMS = {"next_line": 500, "rest_of_line": 8, "text": 4}


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluation_data.build_engine(tmp_path_factory.mktemp("engines") / "engine")


@pytest.fixture(scope="module")
def results(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What lm-eval says of the engine and of the Hugging Face model, with its samples."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("tasks")
    register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "hf"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name, text in TASKS.items():
            items = folder / f"{name}.jsonl"
            rows = evaluation_data.next_lines(ITEMS[name], before=40 if name == "text" else 4)
            items.write_text("".join(json.dumps(row) + "\n" for row in rows))
            data = {"data_files": {"test": str(items)}, "cache_dir": str(folder / "cache")}
            head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test"
            (folder / f"{name}.yaml").write_text(head + text)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        common = {"tasks": list(TASKS), "task_manager": manager, "bootstrap_iters": 0, "device": "cpu"}
        return {
            "engine": lm_eval.simple_evaluate(
                model="fp8-engine", model_args=f"engine_dir={engine_dir},device=cpu", **common
            ),
            "hf": lm_eval.simple_evaluate(model="hf", model_args=f"pretrained={MODEL},dtype=float32", **common),
        }  # fmt: skip


def samples(results: dict[str, dict[str, Any]], task: str) -> list[tuple[dict, dict]]:
    pairs = zip(results["engine"]["samples"][task], results["hf"]["samples"][task], strict=True)
    return [(a, b) for a, b in pairs if a["doc_id"] == b["doc_id"]]


def test_multiple_choice_agrees_item_by_item(results: dict[str, dict[str, Any]]) -> None:
    pairs = samples(results, "next_line")
    assert len(pairs) == ITEMS["next_line"]
    for ours, theirs in pairs:
        for (a, greedy_a), (b, greedy_b) in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
            assert float(a) == pytest.approx(float(b), abs=0.3, rel=0.02) and greedy_a == greedy_b
    for metric in ("acc,none", "acc_norm,none"):
        found = [r["results"]["next_line"][metric] for r in results.values()]
        assert found[0] == pytest.approx(found[1], abs=1 / ITEMS["next_line"]) and found[0] > 0.25


def test_generated_texts_agree(results: dict[str, dict[str, Any]]) -> None:
    pairs = samples(results, "rest_of_line")
    same = [a["resps"] == b["resps"] for a, b in pairs]
    assert len(same) == ITEMS["rest_of_line"] and sum(same) >= len(same) - 1
    assert all("\n" not in a["resps"][0][0] for a, _ in pairs)


def test_rolling_log_likelihoods_agree(results: dict[str, dict[str, Any]]) -> None:
    found = [r["results"]["text"]["bits_per_byte,none"] for r in results.values()]
    assert found[0] == pytest.approx(found[1], rel=2e-3)


@pytest.fixture(scope="module")
def model(engine_dir: Path) -> Fp8Engine:
    return Fp8Engine(str(engine_dir), "cpu")


def test_rolling_windows_of_a_long_text_count_every_token_once(model: Fp8Engine) -> None:
    text = evaluation_data.heldout()[:9000]
    tokens = model.tok_encode(text)
    windows = list(model._rolling(text))
    assert len(tokens) > 2 * model.max_length and len(windows) > 2
    assert [t for _, scored in windows for t in scored] == tokens
    assert all(len(context) + len(scored) <= model.max_length for context, scored in windows)
    assert windows[0][0] == [model.prefix_token_id]


def test_requests_are_answered_in_order_and_from_an_empty_context(model: Fp8Engine) -> None:
    requests = [Instance("loglikelihood", {}, ("", " x"), 0), Instance("loglikelihood", {}, ("def f(", "self"), 1)]
    (empty, _), (usual, _) = model.loglikelihood(requests, disable_tqdm=True)
    ((other, _),) = model.loglikelihood(requests[1:], disable_tqdm=True)
    assert empty < 0 and usual == pytest.approx(other, abs=1e-4)


def test_sampling_is_seeded_and_ends_at_stop_strings(model: Fp8Engine) -> None:
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "until": [":"], "max_gen_toks": 20}
    requests = [Instance("generate_until", {}, (f"def function{i}", options), i) for i in range(3)]
    first, again = (model.generate_until(requests, disable_tqdm=True) for _ in range(2))
    assert first == again and all(":" not in text for text in first)


def test_chat_templates_are_the_tokenizer_s(model: Fp8Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert model.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi<a>"
    assert model.chat_template(True) == template and model.tokenizer_name


@pytest.mark.parametrize(
    ("context", "continuation", "found"),
    [
        ([1, 2, 3], [4, 5], ([1, 2, 3], [4, 5])),
        ([1, 2, 3, 4], [5, 6], ([2, 3, 4], [5, 6])),
        ([1, 2], [3, 4, 5, 6, 7, 8], ([4], [5, 6, 7, 8])),
    ],
)
def test_long_sequences_keep_their_end(context: list[int], continuation: list[int], found: tuple) -> None:
    assert cut(context, continuation, 5) == found


def test_generation_kwargs_become_sampling_params() -> None:
    params = sampling_params({"until": "x", "do_sample": False, "temperature": 0.7, "max_new_tokens": 9}, 256, 1)
    assert (params.stop, params.temperature, params.max_tokens) == (("x",), 0.0, 9)
    assert sampling_params({"until": ["", "y"]}, 256, 1).max_tokens == 256
    with pytest.raises(RequestError, match="generation_kwargs has num_beams"):
        sampling_params({"num_beams": 4}, 256, 1)
    with pytest.raises(RequestError, match="top_p is 3"):
        sampling_params({"top_p": 3}, 256, 1)


def test_more_tokens_than_the_engine_holds_are_refused(model: Fp8Engine) -> None:
    with pytest.raises(RequestError, match="max_gen_toks is 1024, and the engine holds 1024"):
        model.generate_until([Instance("generate_until", {}, ("x", {"max_gen_toks": 1024}), 0)], disable_tqdm=True)


def test_a_tokenizer_of_another_model_is_refused(model: Fp8Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "tok_encode", lambda text, **_: [2048] * len(text))
    with pytest.raises(RequestError, match=r"token 2048 .*outside the vocabulary"):
        model.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)], disable_tqdm=True)
    with pytest.raises(RequestError, match=r"token 2048 .*outside the vocabulary"):
        model.generate_until([Instance("generate_until", {}, ("a", {"until": []}), 0)], disable_tqdm=True)


def test_a_directory_without_an_engine_ends_the_command_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "fp8-engine", "--model_args", f"engine_dir={tmp_path}", "--tasks", "hellaswag"]
    monkeypatch.setattr("sys.argv", ["fp8-lm-eval", *flags])
    assert main() == 1
    assert f"fp8-lm-eval: {tmp_path}/rank0.engine does not exist" in capsys.readouterr().err


def test_lm_eval_finds_the_class() -> None:
    """Registered by fp8-lm-eval, beside lm-eval's own models; and by the entry point that newer releases look for."""
    register()
    assert get_model("fp8-engine") is Fp8Engine and "hf" in model_registry
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["lm_eval.models"]["fp8-engine"]
    entry = EntryPoint("fp8-engine", value, "lm_eval.models")
    registry: Registry[Any] = Registry("model", base_cls=LM)
    registry.register("fp8-engine", target=entry)
    assert registry.get("fp8-engine") is Fp8Engine


def test_model_args_come_before_lm_eval_s_own_flags(engine_dir: Path) -> None:
    flags = {"device": "cuda:0", "batch_size": 1, "max_batch_size": None}
    assert Fp8Engine.create_from_arg_obj({"engine_dir": str(engine_dir), "device": "cpu"}, flags).device.type == "cpu"
    assert Fp8Engine.create_from_arg_string(f"engine_dir={engine_dir}", flags).device.type == "cpu", "there is no GPU"
