"""What the runtime tells of itself: a record per step, sums, and /metrics as Prometheus' own client reads it."""

from __future__ import annotations

import pytest
import tiny_engine
from prometheus_client.parser import text_string_to_metric_families

from fp8.runtime.llm import LLM
from fp8.runtime.sampling_params import SamplingParams
from fp8.runtime.server.metrics import exposition


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """After 24 requests on a pool for some four of them, with a beginning in common."""
    llm = LLM(tiny_engine.write(tmp_path_factory.mktemp("tiny")), "cpu", max_kv_blocks=9, lag=1)
    prompts = [[*range(70), i] for i in range(20)] + [[i] * (5 * i) for i in range(20, 24)]
    llm.generate(prompts, SamplingParams(max_tokens=75, temperature=1.0, seed=1, ignore_eos=True))
    return llm


def test_every_step_tells_its_tokens_blocks_queue_and_times(busy: LLM) -> None:
    s, limits = busy.worker.statistics, busy.session.limits
    assert len(s.steps) == s.step_count > 75
    for step in s.steps:
        assert 0 <= step.decode_rows <= step.rows <= limits.max_batch_size and step.rows <= step.tokens
        assert step.tokens <= limits.max_num_tokens and step.sampled <= limits.max_batch_size
        assert step.held_blocks + step.free_blocks == 9 and 0 <= step.cached_blocks <= step.free_blocks
        assert step.running + step.waiting <= 24
        assert min(step.schedule_seconds, step.enqueue_seconds, step.read_seconds) >= 0
    first, last = s.steps[0], s.steps[-1]
    assert first.waiting > 0 and first.running > 0 and (last.running, last.waiting, last.held_blocks) == (0, 0, 0)
    assert max(step.held_blocks for step in s.steps) == 9 and max(step.waiting for step in s.steps) >= 16
    assert sum(0 < step.decode_rows < step.rows for step in s.steps) > 3, "prompts beside decode rows"


def test_sums_are_those_of_the_steps_and_of_the_requests(busy: LLM) -> None:
    s = busy.worker.statistics
    assert s.computed_tokens == sum(step.tokens for step in s.steps)
    assert s.generated_tokens == sum(step.sampled for step in s.steps) == 24 * 75
    assert s.preemptions == sum(step.preemptions for step in s.steps) > 0
    assert s.reused_tokens == sum(step.reused_tokens for step in s.steps) >= 19 * 64
    assert s.finished == {"length": 24}
    for histogram in (s.queue_seconds, s.first_token_seconds, s.request_seconds):
        assert sum(histogram.counts) == 24 and histogram.sum > 0
    assert s.queue_seconds.sum <= s.first_token_seconds.sum <= s.request_seconds.sum


def test_prometheus_reads_the_metrics(busy: LLM) -> None:
    s = busy.worker.statistics
    found = {family.name: family for family in text_string_to_metric_families(exposition(busy.worker, 3))}
    values = {name: f.samples[0].value for name, f in found.items() if len(f.samples) == 1}
    assert values["fp8_generated_tokens"] == 24 * 75 and values["fp8_requests_refused"] == 3
    assert values["fp8_steps"] == s.step_count and values["fp8_preemptions"] == s.preemptions
    assert values["fp8_kv_blocks"] == values["fp8_kv_blocks_free"] == 9
    assert values["fp8_requests_running"] == values["fp8_requests_waiting"] == 0
    assert values["process_open_fds"] > 2 and values["process_resident_memory_bytes"] > 1e6
    assert found["fp8_preemptions"].type == "counter" and found["fp8_kv_blocks"].type == "gauge"
    ends = {sample.labels["reason"]: sample.value for sample in found["fp8_requests_finished"].samples}
    assert ends == {"stop": 0, "length": 24, "abort": 0}
    seconds = found["fp8_request_seconds"]
    buckets = [sample.value for sample in seconds.samples if sample.name.endswith("_bucket")]
    assert seconds.type == "histogram" and buckets == sorted(buckets) and buckets[-1] == 24
    assert next(sample.value for sample in seconds.samples if sample.name.endswith("_sum")) == s.request_seconds.sum
