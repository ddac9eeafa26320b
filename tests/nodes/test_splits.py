"""A network is divided into parts that together are the whole, or refused before its weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason
from latentflow_nodes import families
from latentflow_nodes.families.splits import INPUTS, OUTPUTS, Shard, Split
from support.packs import SHAPES, tiny_sdxl

FAMILY = families.of_pipeline(SHAPES)
PLAN = FAMILY.plan_split(SHAPES / "unet")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from([OUTPUTS, INPUTS]))
def test_the_parts_of_all_ranks_are_the_whole(part: int, ranks: int, sections: int, dim: int) -> None:
    size = part * ranks * sections
    whole = torch.arange(size * 2).reshape((size, 2) if dim == OUTPUTS else (2, size))
    split = Split(layer="a", dim=dim, size=size, sections=sections)
    parts = [split.cut(whole, rank=rank, ranks=ranks).chunk(sections, dim) for rank in range(ranks)]
    assert torch.equal(torch.cat([one[at] for at in range(sections) for one in parts], dim), whole)


def test_each_pair_of_layers_is_divided_by_outputs_and_then_by_inputs() -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    dims = {split.layer: (split.dim, split.sections) for split in PLAN.splits}
    for attention in (f"{block}.attn1", f"{block}.attn2"):
        assert {dims[f"{attention}.{one}"] for one in ("to_q", "to_k", "to_v")} == {(OUTPUTS, 1)}
        assert dims[f"{attention}.to_out.0"] == (INPUTS, 1)
    # Values and gates.
    assert (dims[f"{block}.ff.net.0.proj"], dims[f"{block}.ff.net.2"]) == ((OUTPUTS, 2), (INPUTS, 1))
    resnet = "up_blocks.1.resnets.1"
    assert {dims[f"{resnet}.{one}"] for one in ("conv1", "time_emb_proj", "norm2")} == {(OUTPUTS, 1)}
    assert dims[f"{resnet}.conv2"] == (INPUTS, 1)
    assert not dims.keys() & {"conv_in", "conv_out", f"{resnet}.norm1", f"{resnet}.conv_shortcut", f"{block}.norm1"}


@pytest.mark.parametrize("ranks", [3, 8, 16])
def test_a_degree_that_heads_are_no_multiple_of_is_refused_without_weights(tmp_path: Path, ranks: int) -> None:
    shutil.copy(SHAPES / "unet/config.json", tmp_path)
    plan = FAMILY.plan_split(tmp_path)
    with pytest.raises(FailedPreconditionError) as caught:
        plan.check(ranks)
    assert caught.value.reason == Reason.TENSOR_DEGREE
    assert f"among {ranks} ranks: down_blocks.0.attentions.0.transformer_blocks.0.attn1 has 4 attention heads" in str(
        caught.value
    )
    assert caught.value.message.endswith("Set parallelism.tensor to one of 1, 2, 4.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "torchao"}}, "are quantised (torchao)"),
        ({"in_channels": 9}, "an inpainting network"),
    ],
)
def test_a_network_that_is_not_served_whole_is_not_served_divided(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config = json.loads((SHAPES / "unet/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(FailedPreconditionError) as caught:
        FAMILY.plan_split(tmp_path)
    assert caught.value.reason == Reason.UNSUPPORTED_FAMILY
    assert words in caught.value.message


@pytest.mark.parametrize(("heads", "groups", "words"), [(5, 16, "attn1 has 5 attention heads"), (4, 1, "has 1 groups")])
def test_the_refusal_names_the_layer_that_cannot_be_divided(heads: int, groups: int, words: str) -> None:
    changed = [
        {"attention heads": heads, "groups": groups}[count.things] if count.value else 0 for count in PLAN.counts
    ]
    counts = tuple(
        type(count)(module=count.module, attribute=count.attribute, value=value, things=count.things)
        for count, value in zip(PLAN.counts, changed, strict=True)
    )
    with pytest.raises(FailedPreconditionError, match=words):
        type(PLAN)(splits=PLAN.splits, counts=counts).check(2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_hold_equal_parts_and_a_summed_bias_once(tmp_path: Path, ranks: int) -> None:
    pipeline = tiny_sdxl(tmp_path / "tiny")
    family = families.of_pipeline(pipeline)
    plan = family.plan_split(pipeline / "unet")
    plan.check(ranks)
    whole = family.load_denoiser(pipeline / "unet", dtype=torch.float32, variant=None).state_dict()
    parts = [
        family.load_denoiser(
            pipeline / "unet", dtype=torch.float32, variant=None, shard=Shard(plan=plan, rank=rank, ranks=ranks)
        ).state_dict()
        for rank in range(ranks)
    ]
    splits = {split.layer: split for split in plan.splits}
    for name, weight in whole.items():
        layer, _, kind = name.rpartition(".")
        its = [part[name] for part in parts]
        if layer not in splits:
            assert all(torch.equal(one, weight) for one in its)
        elif splits[layer].dim == INPUTS and kind == "bias":
            assert torch.equal(sum(its, torch.zeros_like(weight)), weight)
        else:
            assert {one.numel() * ranks for one in its} == {weight.numel()}
            assert sorted(torch.cat([one.flatten() for one in its]).tolist()) == sorted(weight.flatten().tolist())


def test_weights_of_another_shape_than_the_configuration_are_refused_by_every_rank(tmp_path: Path) -> None:
    shutil.copytree(SHAPES / "unet", tmp_path / "unet")
    config = tmp_path / "unet/config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 96', '"cross_attention_dim": 64'))
    plan = FAMILY.plan_split(tmp_path / "unet")
    with pytest.raises(FailedPreconditionError) as caught:
        FAMILY.load_denoiser(
            tmp_path / "unet", dtype=torch.float32, variant=None, shard=Shard(plan=plan, rank=1, ranks=2)
        )
    assert caught.value.reason == Reason.WEIGHTS_MISMATCH
    assert "of another shape" in caught.value.message
