"""PEFT's configuration of an adapter, as far as it decides the strength of the layers.

It is a file beside the weights (`adapter_config.json`) or, in files of diffusers, text in the header. Fields that ask for
anything but plain LoRA are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from latentflow_nodes.adapters import patterns
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
_REMEDY = "Use a plain LoRA, or merge this one into the base model with PEFT (merge_and_unload)."
# Other ways to initialise a LoRA change the weights of the base model too, and these changes are not in the file.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT's own values where a configuration leaves out rank or alpha.
_DEFAULT = 8
# Above every alpha in use; its products stay finite in float32.
_LARGEST_ALPHA = 1e30
_SHOWN = 40
_Value = TypeVar("_Value", int, float)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How strong the layers are, by PEFT's rules.

    Attributes:
        ranks: Those of the layers that a pattern matches; the first match counts.
        alphas: As `ranks`.
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], int], ...] = ()
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()
    rank_stabilised: bool = False

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha of a layer, such that alpha / rank is its strength. ValueError where the rank is another."""
        expected = _matching(self.ranks, layer, self.rank)
        if expected != rank:
            raise ValueError(f"layer {layer} has rank {rank}, and its configuration has rank {expected}")
        alpha = _matching(self.alphas, layer, self.alpha)
        # Rank-stabilised LoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


def parse(fields: Mapping[str, Any], *, file: str) -> Config:
    """The configuration with these fields of PEFT's LoraConfig. FailedPreconditionError where it is no plain LoRA.

    Args:
        file: Its name in messages.
    """
    kind = fields.get("peft_type") or "LORA"
    if kind != "LORA":
        raise unusable(f"{file} configures the type {kind}, and this version applies plain LoRA only. {_REMEDY}")
    initial = fields.get("init_lora_weights")
    if initial not in _INITIAL:
        raise unusable(
            f"{file} has init_lora_weights {initial!r}, which changed the base model too; convert it to a plain "
            "LoRA with PEFT (path_initial_model_for_weight_conversion)."
        )
    for name, value in sorted(fields.items()):
        if value and name not in _ANY_VALUE and (name, value) != ("bias", "none"):
            what = _NAMES.get(name, f"a LoRA with {name}")
            raise unusable(f"{file} configures {what}, and this version applies plain LoRA only. {_REMEDY}")
    if fields.get("use_rslora") not in (True, False, None):
        raise unusable(f"{file} has use_rslora {_shown(fields['use_rslora'])}; it is true or false.")
    ranks, alphas = (_by_pattern(fields, name, file=file) for name in ("rank_pattern", "alpha_pattern"))
    return Config(
        rank=_rank(fields.get("r", _DEFAULT), "r", file=file),
        alpha=_alpha(fields.get("lora_alpha", _DEFAULT), "lora_alpha", file=file),
        ranks=tuple((pattern, _rank(value, "a value of rank_pattern", file=file)) for pattern, value in ranks),
        alphas=tuple((pattern, _alpha(value, "a value of alpha_pattern", file=file)) for pattern, value in alphas),
        rank_stabilised=bool(fields.get("use_rslora")),
    )


def _rank(value: object, name: str, *, file: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise unusable(f"{file} has {_shown(value)} as {name}; a rank is a whole number of at least 1.")
    return value


def _alpha(value: object, name: str, *, file: str) -> float:
    # NaN is no more than the limit either.
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST_ALPHA:
        raise unusable(f"{file} has {_shown(value)} as {name}; an alpha is a number of at most {_LARGEST_ALPHA:g}.")
    return float(value)


def _by_pattern(fields: Mapping[str, Any], name: str, *, file: str) -> list[tuple[re.Pattern[str], Any]]:
    found = fields.get(name) or {}
    if not isinstance(found, dict):
        raise unusable(f"{file} has {name} {_shown(found)}; it is a JSON object.")
    compiled = []
    for pattern, value in found.items():
        try:
            compiled.append((patterns.compiled(pattern), value))
        except ValueError as error:
            raise unusable(f"{file} has {_shown(pattern)} in {name}, which {error}.") from None
    return compiled


def _matching(values: tuple[tuple[re.Pattern[str], _Value], ...], layer: str, otherwise: _Value) -> _Value:
    """The value of the first pattern that matches a layer."""
    return next((value for pattern, value in values if pattern.match(layer)), otherwise)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
