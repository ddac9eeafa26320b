"""PEFT's configuration of an adapter, as far as it decides the strength of the layers.

It is a file beside the weights (`adapter_config.json`) or, in files of diffusers, text in the header. Fields that ask for
anything but plain LoRA are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentflow_nodes.adapters.keys import unusable

# Fields that a plain LoRA may have at any value: those that are read here, and those that matter in training only.
_ANY_VALUE = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}
_NAMES = {"use_dora": "a DoRA", "lora_bias": "a LoRA with biases"}
# Other ways to initialise a LoRA change the weights of the base model too, and these changes are not in the file.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT's own values where a configuration leaves out rank or alpha.
_DEFAULT = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """How strong the layers are, by PEFT's rules."""

    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha of a layer, such that alpha / rank is its strength. ValueError where the rank is another."""
        expected = int(_matching(self.ranks, layer, self.rank))
        if expected != rank:
            raise ValueError(f"layer {layer} has rank {rank}, and its configuration has rank {expected}")
        alpha = float(_matching(self.alphas, layer, self.alpha))
        # Rank-stabilised LoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


def parse(fields: Mapping[str, Any], *, file: str) -> Config:
    """The configuration with these fields of PEFT's LoraConfig. FailedPreconditionError where it is no plain LoRA.

    Args:
        file: Its name in messages.
    """
    kind = fields.get("peft_type") or "LORA"
    if kind != "LORA":
        raise unusable(f"{file} configures an adapter of the type {kind}, and this version applies plain LoRA only.")
    initial = fields.get("init_lora_weights")
    if initial not in _INITIAL:
        raise unusable(
            f"{file} has init_lora_weights {initial!r}, which changed the base model too; convert the adapter to a plain "
            "LoRA with PEFT (path_initial_model_for_weight_conversion)."
        )
    for name, value in sorted(fields.items()):
        if value and name not in _ANY_VALUE and (name, value) != ("bias", "none"):
            what = _NAMES.get(name, f"an adapter with {name}")
            raise unusable(f"{file} configures {what}, and this version applies plain LoRA only.")
    return Config(
        rank=fields.get("r", _DEFAULT),
        alpha=fields.get("lora_alpha", _DEFAULT),
        ranks=fields.get("rank_pattern") or {},
        alphas=fields.get("alpha_pattern") or {},
        rank_stabilised=bool(fields.get("use_rslora")),
    )


def _matching(patterns: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the whole name of a layer, or its last segments."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return otherwise
