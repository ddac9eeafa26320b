"""How a network is divided among the ranks of one replica: data that a family makes of its network without weights. Pure.

Layers are divided in pairs. Of the first layer of a pair each rank computes an equal part of the outputs; with this part as its
inputs it computes the second layer. The outputs of the second layer, summed over the ranks, are those of the whole pair. All
other layers are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason

OUTPUTS, INPUTS = 0, 1
MOST_RANKS = 16
# Activations whose inputs have two halves: the values, and the gates that multiply them.
_GATED = ("GEGLU", "SwiGLU")


@dataclass(frozen=True, kw_only=True)
class Split:
    """A layer whose parameters are divided.

    Attributes:
        layer: Its name in the network.
        dim: The dimension of the weight that is divided: OUTPUTS, and the bias with it, or INPUTS.
        size: Size of this dimension in the whole weight.
        sections: Number of equal sections of this dimension, each of which is divided.
    """

    layer: str
    dim: int
    size: int
    sections: int = 1

    def cut(self, whole: Any, *, rank: int, ranks: int) -> torch.Tensor:
        """A copy of a rank's part.

        Args:
            whole: A tensor with the divided dimension at `dim`, or a slice of a safetensors file.
        """
        section = self.size // self.sections
        part = section // ranks
        starts = [first + rank * part for first in range(0, self.size, section)]
        kept = (slice(None),) * self.dim
        return torch.cat([whole[(*kept, slice(start, start + part))] for start in starts], self.dim)


@dataclass(frozen=True, kw_only=True)
class Count:
    """A number of things in a module, of which each rank has an equal part.

    Attributes:
        module: Its name in the network.
        attribute: The attribute of the module that is this number.
        value: The number in the whole network.
        things: What is counted, for messages.
    """

    module: str
    attribute: str
    value: int
    things: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a network is divided."""

    splits: tuple[Split, ...]
    counts: tuple[Count, ...]

    def check(self, ranks: int) -> None:
        """FailedPreconditionError unless the network can be divided among so many ranks."""
        if (problem := self._problem(ranks)) is None:
            return
        allowed = ", ".join(str(one) for one in range(1, MOST_RANKS + 1) if self._problem(one) is None)
        raise FailedPreconditionError(
            f"The network cannot be divided among {ranks} ranks: {problem}. Set parallelism.tensor to one of {allowed}.",
            reason=Reason.TENSOR_DEGREE,
        )

    def _problem(self, ranks: int) -> str | None:
        for count in self.counts:
            if count.value % ranks:
                return f"{count.module} has {count.value} {count.things}"
        for split in self.splits:
            if split.size // split.sections % ranks:
                where = "inputs" if split.dim == INPUTS else "outputs"
                return f"{split.layer} has {split.size} {where}"
        return None


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rank's part of a network."""

    plan: Plan
    rank: int
    ranks: int

    @cached_property
    def splits(self) -> Mapping[str, Split]:
        """The divided layers by name."""
        return {split.layer: split for split in self.plan.splits}

    def cut(self, split: Split, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor that is divided as a layer is."""
        return split.cut(whole, rank=self.rank, ranks=self.ranks)

    def parameter(self, name: str, whole: Any) -> torch.Tensor:
        """A copy of this rank's part of a parameter.

        Args:
            name: Its name in the network.
            whole: The whole parameter, as a tensor or as a slice of a safetensors file.
        """
        layer, _, kind = name.rpartition(".")
        split = self.splits.get(layer)
        if split is None:
            copy: torch.Tensor = whole[:].clone()
            return copy
        if split.dim == INPUTS and kind == "bias":
            # The sum over the ranks has to contain it once.
            bias: torch.Tensor = whole[:]
            return bias.clone() if self.rank == 0 else torch.zeros_like(bias)
        return split.cut(whole, rank=self.rank, ranks=self.ranks)


def of_unet(network: torch.nn.Module) -> Plan:
    """Of a UNet2DConditionModel: attention by heads, feed-forward, and the convolutions of residual blocks by groups.

    Attention of kinds that SD and SDXL do not have is whole on every rank.
    """
    splits: list[Split] = []
    counts: list[Count] = []
    for name, module in network.named_modules():
        if isinstance(module, Attention) and _is_plain(module):
            splits += [_outputs(f"{name}.{one}", module.get_submodule(one)) for one in ("to_q", "to_k", "to_v")]
            splits.append(_inputs(f"{name}.to_out.0", module.to_out[0]))
            counts.append(Count(module=name, attribute="heads", value=module.heads, things="attention heads"))
        elif isinstance(module, FeedForward):
            first, second = module.net[0], module.net[2]
            sections = 2 if type(first).__name__ in _GATED else 1
            splits.append(_outputs(f"{name}.net.0.proj", first.proj, sections=sections))
            splits.append(_inputs(f"{name}.net.2", second))
        elif isinstance(module, ResnetBlock2D):
            splits.append(_outputs(f"{name}.conv1", module.conv1))
            if module.time_emb_proj is not None:
                sections = 2 if module.time_embedding_norm == "scale_shift" else 1
                splits.append(_outputs(f"{name}.time_emb_proj", module.time_emb_proj, sections=sections))
            splits.append(_outputs(f"{name}.norm2", module.norm2))
            splits.append(_inputs(f"{name}.conv2", module.conv2))
            groups = module.norm2.num_groups
            counts.append(Count(module=f"{name}.norm2", attribute="num_groups", value=groups, things="groups"))
    return Plan(splits=tuple(splits), counts=tuple(counts))


def _is_plain(attention: Any) -> bool:
    """Whether every head has its own keys and values, made by the four projections alone."""
    return (
        attention.to_k is not None
        and attention.to_out is not None
        and attention.added_kv_proj_dim is None
        and attention.inner_kv_dim == attention.inner_dim
        and attention.norm_q is None
        and attention.norm_k is None
    )


def _outputs(name: str, layer: Any, *, sections: int = 1) -> Split:
    return Split(layer=name, dim=OUTPUTS, size=layer.weight.shape[OUTPUTS], sections=sections)


def _inputs(name: str, layer: Any) -> Split:
    return Split(layer=name, dim=INPUTS, size=layer.weight.shape[INPUTS])
