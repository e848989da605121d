import dataclasses
import subprocess
import sys

import pytest

from specforge.config.run import RunConfig
from specforge.contracts.capture import CaptureSpec, TargetInfo
from specforge.contracts.features import layout
from specforge.errors import ConfigError
from specforge.launch.plan import DataFacts, ModelFacts, Plan, bytes_per_token, make_plan, sample_bytes

TARGET = TargetInfo(
    path="target",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    revision="0" * 64,
    num_layers=36,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=None,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
    eos_token_ids=(151645,),
)
SPEC = CaptureSpec((1, 17, 32), last_hidden=True, dtype="bfloat16")
FACTS = DataFacts(num_samples=1000, num_tokens=500_000, max_tokens=1024)
MODELS = ModelFacts(target_bytes=16_400_000_000, draft_parameters=400_000_000)


def config(**sections) -> RunConfig:
    return RunConfig.model_validate({"run_dir": "run", "target": {"path": "t"}, "data": {"path": "d"}, **sections})


def plan(facts: DataFacts = FACTS, **sections) -> Plan:
    return make_plan(config(**sections), TARGET, SPEC, facts, MODELS)


def test_eagle3_features_of_an_8b_target_cost_32_kb_a_token():
    assert bytes_per_token(TARGET, SPEC) == 4 * 4096 * 2 + 4


def test_the_planned_size_of_a_sample_is_the_size_of_its_buffer():
    for tokens in (1, 17, 1024):
        shapes = [
            ("input_ids", "int32", (tokens,)),
            ("aux", "bfloat16", (tokens, 3 * 4096)),
            ("last", "bfloat16", (tokens, 4096)),
        ]
        assert sample_bytes(TARGET, SPEC, tokens) == layout(shapes)[1]


def test_automatic_parts_follow_the_topology():
    together = plan()
    apart = plan(topology="disaggregated")
    assert (together.store, together.ledger, len(together.processes)) == ("local", "none", 1)
    assert (apart.store, apart.ledger, len(apart.processes)) == ("shared_memory", "sqlite", 2)


def test_an_automatic_arena_always_holds_the_window():
    apart = plan(topology="disaggregated", training={"global_batch_size": 64})
    assert apart.store_capacity_bytes is not None
    assert apart.window_bytes <= 0.75 * apart.store_capacity_bytes
    assert apart.max_sample_bytes <= apart.store_capacity_bytes / 64


def test_an_arena_that_is_too_small_is_refused_with_the_number_that_would_do():
    store = {"kind": "shared_memory", "capacity_bytes": "64MiB"}
    with pytest.raises(ConfigError, match=r"set it to ([\d,]+) or more") as refused:
        plan(topology="disaggregated", data_plane={"store": store})
    enough = int(str(refused.value).split("set it to ")[1].split(" ")[0].replace(",", ""))
    plan(topology="disaggregated", data_plane={"store": {"kind": "shared_memory", "capacity_bytes": enough}})


def test_a_window_in_which_the_trainer_waits_for_itself_is_refused():
    with pytest.raises(ConfigError, match="set it to 4 or more"):
        plan(control_plane={"window_steps": 3}, data_plane={"prefetch_steps": 2})


def test_steps_count_every_sample_once_an_epoch_and_end_at_max_steps():
    assert plan(training={"num_epochs": 3, "global_batch_size": 16}).total_steps == 188
    assert plan(training={"num_epochs": 3, "global_batch_size": 16, "max_steps": 7}).total_steps == 7


def test_memory_is_counted_where_it_is_held():
    together, (train, capture) = plan().processes[0], plan(topology="disaggregated").processes
    assert capture.memory_bytes > MODELS.target_bytes
    assert 16 * MODELS.draft_parameters < train.memory_bytes < MODELS.target_bytes
    assert together.memory_bytes > MODELS.target_bytes + 16 * MODELS.draft_parameters


def test_a_plan_is_plain_data():
    assert dataclasses.asdict(plan()).keys() == plan(topology="disaggregated").to_dict().keys()


def test_plans_are_made_without_a_tensor_library():
    code = "import sys, specforge.launch.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
