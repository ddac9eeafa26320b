"""The text encoder: prompts to conditioning, with the text parts of LoRAs merged before encoding."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from latentflow.errors import FailedPreconditionError, InvalidRequestError, LatentflowError
from latentflow.internal import strengths
from latentflow.internal.source_folder import is_present
from latentflow.reasons import Reason
from latentflow.v1 import control_pb2, stage_pb2

from latentflow_nodes import families
from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.context import Context
from latentflow_nodes.engine.forward_time import measure
from latentflow_nodes.engine.load import PassSize
from latentflow_nodes.engine.worker import Worker
from latentflow_nodes.families.base import Shape, TextModel
from latentflow_nodes.roles.network_role import NetworkRole
from latentflow_nodes.weights import files

# Measured on two cores: 0.3 million parameters take 2 ms with one thread, and 8 ms with two of which one sleeps between
# requests.
_PARAMETERS_PER_THREAD = 1_000_000


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A prompt to encode.

    Attributes:
        adapters: By encoder the layers to merge with their weights, and `adapter_key`, equal for equal sets.
    """

    request: stage_pb2.EncodeRequest
    adapters: Mapping[str, Sequence[tuple[Layers, float]]]
    adapter_key: tuple[Any, ...]

    @property
    def negative_prompt(self) -> str | None:
        return self.request.negative_prompt if self.request.HasField("negative_prompt") else None

    @property
    def group(self) -> Hashable:
        """Equal for prompts that can be encoded together. A missing negative prompt is not encoded as an empty one."""
        alone = object() if self.request.scheduling.deterministic else None
        return (self.request.guidance, self.negative_prompt is None, self.adapter_key, alone)

    @property
    def size(self) -> PassSize:
        return PassSize(rows=2 if self.request.guidance else 1)


class TextEncoder(NetworkRole):
    """Every text encoder of a pipeline with its tokenizer."""

    calls = ("Encode",)

    def __init__(self, context: Context) -> None:
        self._context = context
        source = context.source()
        self._family = families.of_source(source, "TextEncoder")
        self.family = self._family.name
        index = families.text_index(source, self._family)
        present = [name for name in self._family.encoders if is_present(index, name)]
        folders = [source.single_file] if source.single_file else [source.beside(name) for name in present]
        loaded = files.LoadedFiles([path for folder in folders for path in files.check(folder, variant=source.variant)])
        self.content_digest = loaded.digest

        def load() -> TextModel:
            return self._family.load_text(source, index=index, dtype=context.dtype)

        self._text = load()
        encoders = self._text.encoders
        for encoder in encoders.values():
            encoder.to(context.device).eval()
        self._keep(encoders, files=loaded, load=lambda: load().encoders)
        self._mergers = {
            name: Merger(encoder, names=self._family.layer_names(name, encoder), what="text encoder")
            for name, encoder in encoders.items()
        }
        self._merged: tuple[Any, ...] = ()
        # Shapes of what `encode` makes of any prompt; known after the warm-up.
        self._conditioning: dict[str, Shape] = {}
        self._stopwatch = measure(list(encoders.values()), device=context.device)
        settings = context.settings
        self._worker: Worker[_Call, tuple[dict[str, torch.Tensor], stage_pb2.EncodeResponse]] = Worker(
            self._run,
            threads=min(settings.threads, _useful_threads(encoders.values())),
            max_running=settings.engine.max_running,
            max_waiting=settings.engine.max_waiting,
            lock=context.compute_lock,
            load=context.load,
        )

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        for tokenizer in self._text.tokenizers:
            response.text_encoder.tokenizers.add(max_tokens=tokenizer.model_max_length)
        response.text_encoder.conditioning.extend(self._named(self._conditioning))
        response.text_encoder.adapter_components.extend(self._mergers)

    async def warm_up(self) -> None:
        call = _Call(request=stage_pb2.EncodeRequest(), adapters={}, adapter_key=())
        encoded, _ = await self._worker.run(call, group=call.group, size=call.size)
        self._conditioning = {name: tuple(tensor.shape) for name, tensor in encoded.items()}

    def start(self) -> None:
        self._worker.start()

    def undo_merges(self) -> None:
        for merger in self._mergers.values():
            merger.forget()
        self._merged = ()

    def close(self) -> None:
        self._worker.close()

    async def encode(self, request: stage_pb2.EncodeRequest) -> stage_pb2.EncodeResponse:
        for ref in request.adapters:
            strengths.lora_weight(ref.weight, name=ref.name)
        adapters: dict[str, list[tuple[Layers, float]]] = {}
        if request.adapters:
            for name in self._mergers:
                adapters[name] = await self._context.peers.adapters(request.adapters, name)
        key = tuple((ref.name, ref.digest, ref.weight) for ref in request.adapters)
        call = _Call(request=request, adapters=adapters, adapter_key=key)
        encoded, response = await self._worker.run(call, group=call.group, size=call.size)
        for name, tensor in encoded.items():
            response.conditioning[name].CopyFrom(self._context.store.put(tensor, request_id=request.request_id))
        return response

    def _run(
        self, calls: Sequence[_Call]
    ) -> list[tuple[dict[str, torch.Tensor], stage_pb2.EncodeResponse] | LatentflowError]:
        # Tokenizers keep padding and truncation as state, so only the thread that runs this uses them.
        results: list[stage_pb2.EncodeResponse | LatentflowError] = [self._tokenized(call) for call in calls]
        accepted = [call for call, one in zip(calls, results, strict=True) if isinstance(one, stage_pb2.EncodeResponse)]
        if not accepted:
            return [one for one in results if isinstance(one, LatentflowError)]
        self._merge(accepted[0])
        self._stopwatch.take()
        negatives = [call.negative_prompt for call in accepted if call.negative_prompt is not None]
        encoded = self._family.encode(
            self._text,
            prompts=[call.request.prompt for call in accepted],
            negative_prompts=negatives or None,
            guidance=accepted[0].request.guidance,
            device=self._context.device,
        )
        forward_ns = self._stopwatch.take().nanoseconds()
        rows = iter(range(len(accepted)))
        made: list[tuple[dict[str, torch.Tensor], stage_pb2.EncodeResponse] | LatentflowError] = []
        for one in results:
            if isinstance(one, LatentflowError):
                made.append(one)
                continue
            row = next(rows)
            one.forward_ns = forward_ns
            embeddings = {name: tensor[row : row + 1] for name, tensor in encoded.items()}
            is_finite = all(bool(tensor.isfinite().all()) for tensor in embeddings.values())
            made.append((embeddings, one) if is_finite else self._not_finite())
        return made

    def _not_finite(self) -> FailedPreconditionError:
        dtype = str(self._context.dtype).removeprefix("torch.")
        return FailedPreconditionError(
            f"The embeddings of the text encoder are not finite in {dtype}. Lower the weights of the LoRAs, or give the text encoder "
            "a dtype of larger range, bfloat16 or float32. Without LoRAs its own weights may be damaged: fetch them again.",
            reason=Reason.NOT_FINITE,
        )

    def _tokenized(self, call: _Call) -> stage_pb2.EncodeResponse | LatentflowError:
        """What is cut off the prompts, or the refusal to cut them."""
        response = stage_pb2.EncodeResponse(
            truncated=self._cut(call.request.prompt), negative_truncated=self._cut(call.negative_prompt or "")
        )
        cut = response.truncated or response.negative_truncated
        if not call.request.strict_prompt or not cut:
            return response
        longest = min(tokenizer.model_max_length for tokenizer in self._text.tokenizers)
        return InvalidRequestError(
            f"The prompt is longer than the {longest} tokens this model reads; {cut!r} would be cut off. Shorten it, "
            "or allow the cut (strict_prompt off).",
            reason=Reason.PROMPT_TOO_LONG,
        )

    def _merge(self, call: _Call) -> None:
        if call.adapter_key == self._merged:
            return
        self._merged = (None,)
        for name, merger in self._mergers.items():
            parts = call.adapters.get(name, [])
            for (layers, _), ref_key in zip(parts, call.adapter_key, strict=False):
                merger.check(str(ref_key[0]), layers)
            merger.apply(list(parts))
        self._merged = call.adapter_key

    def _cut(self, text: str) -> str:
        """The part of a text that the tokenizer with the lowest limit cuts off."""
        cut = ""
        for tokenizer in self._text.tokenizers:
            room = tokenizer.model_max_length
            # A token stands for at least one character, and two mark start and end: most prompts need no count.
            if text.isascii() and len(text) + 2 <= room:
                continue
            ids = tokenizer(text, truncation=False, padding=False).input_ids
            if len(ids) > room:
                # The end marker is kept, so one token less of the text fits.
                lost = tokenizer.decode(ids[room - 1 : -1])
                cut = max(cut, str(lost), key=len)
        return cut


def _useful_threads(encoders: Iterable[torch.nn.Module]) -> int:
    """How many threads can help: the pass of a small encoder ends before a second thread has woken up."""
    parameters = sum(p.numel() for encoder in encoders for p in encoder.parameters())
    return max(1, parameters // _PARAMETERS_PER_THREAD)
