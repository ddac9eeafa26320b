"""Reads an adapter: the layers of its files, whichever tool wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from latentflow.errors import FailedPreconditionError
from latentflow.internal.weight_files import damage
from safetensors import SafetensorError, safe_open

from latentflow_nodes import families
from latentflow_nodes.adapters import config as configs
from latentflow_nodes.adapters import keys
from latentflow_nodes.adapters.config import Config
from latentflow_nodes.adapters.folder import AdapterFile, Entry
from latentflow_nodes.adapters.keys import Kind, unusable
from latentflow_nodes.adapters.layers import Layer

# Where files of diffusers have the configuration of each component, as JSON.
_HEADER_CONFIG = "lora_adapter_metadata"
_ON_THE_WIRE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter: its layers by component and name.

    Attributes:
        digest: SHA-256 of its files.
    """

    name: str
    digest: str
    components: Mapping[str, Mapping[str, Layer]] = field(repr=False)

    @property
    def rank(self) -> int:
        return max((layer.rank for layers in self.components.values() for layer in layers.values()), default=0)


def load(entry: Entry) -> Adapter:
    """Reads an adapter's files.

    Raises:
        FailedPreconditionError: Its message names the file and says in one sentence why it cannot be used.
    """
    if entry.problem:
        raise unusable(entry.problem)
    total = hashlib.sha256()
    components: dict[str, dict[str, Layer]] = {}
    for file in entry.files:
        try:
            read = _read(file, total)
        except FailedPreconditionError:
            raise
        except OSError as error:
            raise unusable(f"{file.label} cannot be read: {error.strerror or error}.") from None
        except SafetensorError as error:
            raise unusable(f"{file.label} {damage(file.weights, error)}.") from None
        except Exception as error:
            raise unusable(f"{file.label} cannot be used: {error or type(error).__name__}.") from None
        for component, layers in read.items():
            if components.setdefault(component, layers) is not layers:
                raise unusable(f"{file.label} changes the {component}, as another file of its folder does; keep one.")
    return Adapter(name=entry.name, digest=total.hexdigest(), components=components)


def _read(file: AdapterFile, total: Any) -> dict[str, dict[str, Layer]]:
    """The layers of one file, by component. Adds the file to the digest `total`."""
    parts = families.adapter_parts()
    with file.weights.open("rb"):
        # safetensors reports every file that it cannot open as missing.
        pass
    # The header first: a file that is no LoRA may be large.
    with safe_open(file.weights, framework="pt") as opened:
        names, header = list(opened.keys()), opened.metadata() or {}
    component, whole = file.component, None
    if file.config is not None:
        text = file.config.read_bytes()
        total.update(hashlib.sha256(text).digest())
        fields = _object(text, f"{file.label}'s {file.config.name}")
        whole = configs.parse(fields, file=f"{file.label}'s {file.config.name}")
        component = component or _component(fields, file)
    elif any(keys.PEFT_PREFIX in name for name in names):
        raise unusable(
            f"{file.label} was written by PEFT, and its adapter_config.json, which has the alpha, is not beside it; put "
            "both into a folder NAME/."
        )
    parsed = keys.parse(names, file=file.label, parts=parts, component=component)
    # Read at once instead of mapped: another process may shorten the file meanwhile.
    content = file.weights.read_bytes()
    total.update(hashlib.sha256(content).digest())
    try:
        tensors = safetensors.torch.load(content)
    except KeyError as dtype:
        # The format has types that safetensors cannot give to PyTorch.
        raise unusable(f"{file.label} has values of the type {dtype.args[0]}; convert it to float16.") from None
    found: dict[str, dict[str, dict[Kind, torch.Tensor]]] = {}
    for name, key in parsed.items():
        layer = found.setdefault(key.component, {}).setdefault(key.layer, {})
        if layer.setdefault(key.kind, tensors[name]) is not tensors[name]:
            raise unusable(f"{file.label} has {key.kind.value} of the layer {key.layer} twice; remove one of them.")
    by_component = {name: whole or _header_config(header, name, file) for name in found}
    if any(by_component.values()) and any(key.kind is Kind.ALPHA for key in parsed.values()):
        raise unusable(f"{file.label} has alphas in its tensors and in a configuration; remove one of them.")
    return {
        component: {name: _layer(name, pair, by_component[component], file) for name, pair in layers.items()}
        for component, layers in found.items()
    }


def _layer(name: str, found: Mapping[Kind, torch.Tensor], config: Config | None, file: AdapterFile) -> Layer:
    if Kind.A not in found or Kind.B not in found:
        has = ", ".join(kind.value for kind in found)
        raise unusable(f"{file.label} has only {has} of the layer {name}, where A and B belong together.")
    a, b = _values(found[Kind.A], name, file), _values(found[Kind.B], name, file)
    if problem := _problem_of_shapes(a.shape, b.shape):
        raise unusable(
            f"{file.label} has A of the shape {list(a.shape)} and B of the shape {list(b.shape)} in the layer {name}, {problem}."
        )
    rank = int(a.shape[0])
    if Kind.ALPHA in found:
        alpha = _alpha(found[Kind.ALPHA], name, file)
    else:
        # A layer without alpha has the strength 1.
        alpha = float(rank) if config is None else config.alpha_of(name, rank)
    return Layer(a=a, b=b, alpha=alpha)


def _problem_of_shapes(a: torch.Size, b: torch.Size) -> str:
    """Why matrices of these shapes are no layer, as the end of a sentence; empty where they are one."""
    if len(a) < 2 or len(b) < 2:
        return "and each needs at least two dimensions"
    if not a.numel() or not b.numel():
        return "which hold no values"
    if a[0] != b[1]:
        return "whose ranks differ"
    if b[2:].numel() != 1:
        return "where only A may have a kernel"
    return ""


def _alpha(tensor: torch.Tensor, layer: str, file: AdapterFile) -> float:
    if tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool:
        raise unusable(
            f"{file.label} has an alpha of the shape {list(tensor.shape)} and the type {tensor.dtype} in the layer {layer}; "
            "an alpha is one number."
        )
    # Some tools write an alpha as an integer.
    return float(_values(tensor.to(torch.float32), layer, file).item())


def _values(tensor: torch.Tensor, layer: str, file: AdapterFile) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise unusable(
            f"{file.label} has values of the type {tensor.dtype} in the layer {layer}; convert it to float16."
        )
    if tensor.dtype not in _ON_THE_WIRE:
        tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise unusable(f"{file.label} has values that are not finite in the layer {layer}; its training failed.")
    return tensor


def _component(fields: Mapping[str, Any], file: AdapterFile) -> str | None:
    """The component whose class a configuration names; None where it names none."""
    mapping = fields.get("auto_mapping") or {}
    if not isinstance(mapping, dict):
        raise unusable(f"{file.label} has a configuration whose auto_mapping is no JSON object; write it again.")
    name = mapping.get("base_model_class")
    if not name:
        return None
    for part in families.adapter_parts():
        if part.model_class == name:
            return part.component
    known = ", ".join(part.model_class for part in families.adapter_parts())
    raise unusable(f"{file.label} was trained on a {name}, and this version applies LoRAs of {known}.")


def _header_config(header: Mapping[str, str], component: str, file: AdapterFile) -> Config | None:
    if _HEADER_CONFIG not in header:
        return None
    prefix = f"{component}."
    where = f"{file.label}'s header"
    fields = {
        key.removeprefix(prefix): value
        for key, value in _object(header[_HEADER_CONFIG].encode(), where).items()
        if key.startswith(prefix)
    }
    return configs.parse(fields, file=where) if fields else None


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unusable(f"{where} is not JSON ({error}); write it again.") from None
    if not isinstance(loaded, dict):
        raise unusable(f"{where} is no JSON object; write it again.")
    return loaded
