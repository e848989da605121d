"""Options, draft configs, default layers and the catalog."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from specforge.algorithms.catalog import algorithm_names, algorithm_type, get_algorithm
from specforge.algorithms.draft_config import checked_layers
from specforge.algorithms.eagle3.algorithm import Eagle3, default_aux_layers
from specforge.algorithms.eagle3.config import Eagle3DraftConfig, Eagle3Options
from specforge.algorithms.eagle3.model import Eagle3Draft
from specforge.contracts.capture import TargetInfo
from specforge.errors import ConfigError, DraftError


@pytest.fixture
def target() -> TargetInfo:
    return TargetInfo(
        path="target",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        revision="r",
        num_layers=8,
        hidden_size=16,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=40,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_ids=(0,),
    )


def test_default_layers_follow_the_formula(target):
    algorithm = Eagle3(Eagle3Options())
    spec = algorithm.capture_spec(algorithm.draft_config(target), "bfloat16")
    assert (spec.aux_layers, spec.last_hidden, spec.dtype) == ((1, 3, 4), True, "bfloat16")
    assert [default_aux_layers(depth) for depth in (32, 36, 61)] == [(1, 15, 28), (1, 17, 32), (1, 29, 57)]


@pytest.mark.parametrize("depth", [2, 4, 5, 6])
def test_default_layers_that_collide_are_refused_with_valid_ids(depth):
    with pytest.raises(ConfigError, match=f"between 0 and {depth - 2} .* from the default of EAGLE-3; set aux_layers"):
        checked_layers(None, default_aux_layers(depth), depth, "EAGLE-3")


@pytest.mark.parametrize("chosen", [(1, 1, 3), (3, 2, 4), (1, 3, 7), ()])
def test_bad_chosen_layers_are_refused(chosen):
    with pytest.raises(ConfigError, match="from the option aux_layers"):
        checked_layers(chosen, default_aux_layers(8), 8, "EAGLE-3")


def test_draft_config_takes_the_targets_sizes_and_the_options_overrides(target):
    options = Eagle3Options(draft_vocab_size=10, intermediate_size=64, head_dim=16, fc_norm=True)
    config = Eagle3(options).draft_config(target)
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.head_dim) == (
        16,
        64,
        4,
        16,
    )
    assert (config.draft_vocab_size, config.fc_norm, config.rope_scaling) == (10, True, target.rope_scaling)


@pytest.mark.parametrize("flags", [{}, {"fc_norm": True}, {"norm_before_fc": True, "architecture": "qwen3"}])
def test_counted_parameters_are_those_of_the_draft(target, flags):
    config = dataclasses.replace(Eagle3(Eagle3Options(draft_vocab_size=16)).draft_config(target), **flags)
    draft = Eagle3Draft(config, torch.arange(16))
    assert sum(p.numel() for p in draft.parameters()) == config.num_parameters


def test_a_draft_vocabulary_larger_than_the_targets_is_refused(target):
    with pytest.raises(ConfigError, match="at most the target's vocabulary of 40, got 41"):
        Eagle3(Eagle3Options(draft_vocab_size=41)).draft_config(target)


def test_draft_config_survives_a_round_trip(target):
    config = Eagle3(Eagle3Options()).draft_config(target)
    assert Eagle3DraftConfig.from_dict(config.to_dict()) == config


def test_unknown_and_missing_keys_of_a_draft_config_are_named(target):
    values = Eagle3(Eagle3Options()).draft_config(target).to_dict()
    with pytest.raises(DraftError, match="'hiden_size'"):
        Eagle3DraftConfig.from_dict({**values, "hiden_size": 3})
    del values["head_dim"]
    with pytest.raises(DraftError, match="lacks the key 'head_dim'"):
        Eagle3DraftConfig.from_dict(values)


def test_options_refuse_unknown_keys_and_odd_values():
    for bad in (
        {"ttt_step": 3},
        {"mask_offset": 3},
        {"ttt_steps": 0},
        {"step_decay": 0.0},
        {"aux_layers": [-1, 2]},
        {"loss": "ce"},
        {"lk_scale": 1.5},
    ):
        with pytest.raises(ValidationError):
            Eagle3Options(**bad)


def test_every_option_is_described():
    assert all(field.description for field in Eagle3Options.model_fields.values())


def test_catalog_builds_by_name_and_suggests_the_nearest():
    assert "eagle3" in algorithm_names()
    assert isinstance(get_algorithm(Eagle3Options()), Eagle3)
    with pytest.raises(ConfigError, match=r"no algorithm 'eagl3'; expected one of eagle3.*; did you mean 'eagle3'"):
        algorithm_type("eagl3")
    with pytest.raises(ConfigError, match=r"expected one of .*, or install the package that adds it$"):
        algorithm_type("zzz")


def test_options_import_no_tensor_library():
    code = "import sys, specforge.algorithms.eagle3.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
