import dataclasses
import subprocess
import sys

import pytest
from pydantic import ValidationError

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
    return RunConfig.model_validate({"run_dir": "run", "target": {"path": "t"}, "data": {"path": "d"}} | sections)


def plan(facts: DataFacts = FACTS, **sections) -> Plan:
    return make_plan(config(**sections), TARGET, SPEC, facts, MODELS)


def test_eagle3_features_of_an_8b_target_cost_32_kb_a_token():
    assert bytes_per_token(TARGET, SPEC) == 4 * 4096 * 2 + 4


def test_float8_features_cost_half_of_that_and_a_scale_a_layer():
    assert bytes_per_token(TARGET, dataclasses.replace(SPEC, dtype="float8_e4m3fn")) == 4 * 4096 + 4 * 4 + 4


def test_the_planned_size_of_a_float8_sample_is_the_size_of_its_buffer():
    spec = dataclasses.replace(SPEC, dtype="float8_e4m3fn")
    for tokens in (1, 17, 1024):
        shapes = [
            ("input_ids", "int32", (tokens,)),
            ("aux", "float8_e4m3fn", (tokens, 3 * 4096)),
            ("aux_scale", "float32", (tokens, 3)),
            ("last", "float8_e4m3fn", (tokens, 4096)),
            ("last_scale", "float32", (tokens, 1)),
        ]
        assert sample_bytes(TARGET, spec, tokens) == layout(shapes)[1]


def test_batches_ahead_are_planned_for_by_the_smaller_of_both_bounds():
    # 4 layers of 4096 in bfloat16, three int64 and the mask, 16 samples of at most 2048 tokens: 1 GiB and a bit.
    step = (4 * 4096 * 2 + 25) * 16 * 2048
    sections = {"control_plane": {"window_steps": 20}, "training": {"global_batch_size": 16}, "data": {"path": "d"}}

    def planned(**bounds) -> int:
        return plan(**sections, data_plane=bounds).processes[0].memory_bytes

    none = planned(prefetch_steps=0)
    assert planned(prefetch_steps=1, prefetch_bytes="1TB") - none == step
    assert planned(prefetch_steps=9, prefetch_bytes="1TB") - none == 9 * step
    assert planned(prefetch_steps=9, prefetch_bytes="3GB") - none == 3 * 10**9 + step
    assert planned(prefetch_steps=9, prefetch_bytes=1) - none == step + 1


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


def test_every_capture_process_has_an_arena_that_holds_all_of_the_run():
    one = plan(topology="disaggregated")
    three = plan(topology="disaggregated", launch={"num_capture_workers": 3})
    assert [process.name for process in three.processes] == ["train", "capture-0", "capture-1", "capture-2"]
    assert three.store_capacity_bytes == one.store_capacity_bytes
    assert {process.memory_bytes for process in three.processes[1:]} == {one.processes[1].memory_bytes}


def test_features_that_wait_for_a_checkpoint_are_planned_for():
    sections = {"topology": "disaggregated", "training": {"global_batch_size": 4, "checkpoint_every": 10}}
    at_step = plan(**sections)
    at_checkpoint = plan(**sections, control_plane={"release": "at_checkpoint"})
    assert at_step.resident_bytes == at_checkpoint.resident_bytes
    window, waiting = 4 * 4 * at_step.max_sample_bytes, 10 * 4 * at_step.max_sample_bytes
    assert at_step.resident_bytes == {"at_step": window, "at_checkpoint": window + waiting}
    assert at_step.window_bytes == at_checkpoint.window_bytes == window
    # Capture that paused goes on below 80 % of the credits, whatever waits for the checkpoint.
    assert at_checkpoint.store_capacity_bytes is not None
    assert 0.8 * (0.75 * at_checkpoint.store_capacity_bytes - window) >= waiting


def test_an_arena_that_cannot_wait_for_a_checkpoint_is_refused_with_the_number_that_would_do():
    def sections(capacity: int) -> dict:
        return {
            "topology": "disaggregated",
            "control_plane": {"release": "at_checkpoint"},
            "data_plane": {"store": {"kind": "shared_memory", "capacity_bytes": capacity}},
        }

    with pytest.raises(ConfigError, match=r"release = at_checkpoint .* lower .*training\.checkpoint_every") as refused:
        plan(**sections(plan(topology="disaggregated").store_capacity_bytes or 0))
    enough = int(str(refused.value).split("set it to ")[1].split(" ")[0].replace(",", ""))
    plan(**sections(enough))


def test_each_run_has_a_schema_of_its_own_in_postgres():
    ledger = {"kind": "postgres", "url": "postgresql://me@db.example:5432/runs"}
    first = plan(topology="disaggregated", control_plane={"ledger": ledger})
    other = plan(topology="disaggregated", run_dir="other", control_plane={"ledger": ledger})
    named = plan(topology="disaggregated", control_plane={"ledger": {**ledger, "name": "mine"}})
    assert (first.ledger, first.ledger_url, first.ledger_path) == ("postgres", ledger["url"], None)
    assert first.ledger_name is not None
    assert first.ledger_name.startswith("specforge_")
    assert first.ledger_name != other.ledger_name
    assert named.ledger_name == "mine"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"control_plane": {"order": "arrival"}}, "the processes that train capture, and in order; use strict"),
        ({"launch": {"num_capture_workers": 2}}, "the processes that train capture"),
        (
            {"topology": "disaggregated", "control_plane": {"order": "arrival", "ledger": {"kind": "memory"}}},
            "is memory, which does not outlive",
        ),
        (
            {"topology": "disaggregated", "control_plane": {"ledger": {"kind": "none"}}},
            "is none, which does not outlive",
        ),
    ],
)
def test_parts_that_do_not_fit_the_topology_are_refused(sections, message):
    with pytest.raises(ValidationError, match=message):
        config(**sections)


@pytest.mark.parametrize(
    "url", ["postgresql://me:hunter2@db/runs", "postgresql://me@db/runs?password=hunter2", "mysql://me:hunter2@db/runs"]
)
def test_a_password_in_the_address_of_the_ledger_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as refused:
        config(topology="disaggregated", control_plane={"ledger": {"kind": "postgres", "url": url}})
    assert "hunter2" not in str(refused.value)


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


def test_train_ranks_hold_shards_and_whole_weights_and_gradients_during_a_step():
    def train(**training) -> int:
        ranks = plan(training={"global_batch_size": 16, **training}, topology="disaggregated", launch=RANKS).processes
        assert [process.name for process in ranks] == ["train", "train-1", "train-2", "train-3", "capture-0"]
        assert len({process.memory_bytes for process in ranks[:4]}) == 1
        return ranks[0].memory_bytes

    draft = 4 * MODELS.draft_parameters
    shard, pairs, copies = train(), train(sharding="hybrid", shard_size=2), train(sharding="replicate")
    assert (pairs - shard, copies - shard) == (draft, 3 * draft)
    one = plan(training={"global_batch_size": 4}, topology="disaggregated").processes[0].memory_bytes
    assert shard - one == 2 * draft + draft - 4 * draft


RANKS = {"num_train_ranks": 4}


def test_ranks_that_capture_and_train_share_what_a_single_process_keeps_to_itself():
    together = plan(training={"num_epochs": 2}, launch=RANKS)
    alone = plan(training={"num_epochs": 2})
    assert [process.roles for process in together.processes] == [
        ("capture", "controller", "control-plane server", "train"),
        *[("capture", "train")] * 3,
    ]
    assert (alone.store, together.store) == ("local", "shared_memory")
    assert (alone.retain_memory_bytes, alone.retain_file_bytes) == (together.retain_file_bytes, 0)
    assert together.retain_memory_bytes == 0
    assert (together.num_train_ranks, together.step_samples, together.ranks_a_copy) == (4, 4, 4)


def test_a_store_of_one_process_is_refused_for_several_ranks():
    with pytest.raises(ConfigError, match=r"store\.kind is local, .* but this run has 4 train ranks: use auto"):
        plan(launch=RANKS, data_plane={"store": {"kind": "local"}})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"sharding": "hybrid", "shard_size": 3}, "shard_size = 3, but there are 4 train ranks"),
        ({"sequence_parallel": 3}, "sequence_parallel is 3, which does not divide the 4 train ranks"),
    ],
)
def test_ranks_that_cannot_be_divided_are_refused(training, message):
    with pytest.raises(ConfigError, match=message):
        plan(launch=RANKS, training=training)


def test_ranks_without_a_sample_are_warned_of():
    small = plan(launch=RANKS, training={"global_batch_size": 3})
    (warning,) = small.warnings
    assert "global_batch_size is 3, for 4 ranks that train different samples: 1 of them would have none" in warning
    assert plan(launch=RANKS, training={"global_batch_size": 3, "sequence_parallel": 2}).warnings == ()


def test_a_plan_is_plain_data():
    assert dataclasses.asdict(plan()).keys() == plan(topology="disaggregated").to_dict().keys()


def test_plans_are_made_without_a_tensor_library():
    code = "import sys, specforge.launch.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({}, set()),
        ({"topology": "disaggregated"}, {"train"}),
        ({"data": {"features": "set"}}, {"specforge"}),
        ({"topology": "disaggregated", "launch": {"num_train_ranks": 2}}, {"train"}),
    ],
)
def test_whoever_loads_the_target_to_decode_evaluation_prompts_has_room_for_it(sections, names):
    held_out = {"data": "held-out.jsonl", "every": 10, "speculative_every": 10}
    without = {process.name: process.memory_bytes for process in plan(**sections).processes}
    found = {process.name: process.memory_bytes for process in plan(**sections, held_out=held_out).processes}
    more = {name: found[name] - without[name] for name in found}
    assert more == {name: MODELS.target_bytes if name in names else 0 for name in found}
