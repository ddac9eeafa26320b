"""The text encoder: prompts to conditioning, with the text parts of LoRAs merged before encoding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from latentflow.errors import FailedPreconditionError, InvalidRequestError
from latentflow.v1 import control_pb2, stage_pb2

from latentflow_nodes import families
from latentflow_nodes.adapters.layers import Layers
from latentflow_nodes.adapters.merger import Merger
from latentflow_nodes.context import Context
from latentflow_nodes.engine.forward import ForwardTimer
from latentflow_nodes.engine.worker import Worker
from latentflow_nodes.families import FAMILIES, TextParts
from latentflow_nodes.weights import files

_ENCODERS = ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
# Measured on two cores: 0.3 million parameters take 2 ms with one thread, 8 with two of which one sleeps between requests.
_PARAMETERS_A_THREAD = 1_000_000
_CLASSES = {"CLIPTextModel", "CLIPTextModelWithProjection"}


class TextEncoder:
    """Every text encoder of a pipeline with its tokenizer."""

    def __init__(self, context: Context) -> None:
        self._context = context
        root = context.source().pipeline
        self.family = families.detect(root)
        self._family = FAMILIES[self.family]
        index = files.config(root, "model_index.json")
        self.content_digest = files.digest(
            [path for name in _ENCODERS if name in index for path in files.check(root / name)]
        )
        encoders = {name: self._encoder(root, name, index) for name in _ENCODERS if _present(index, name)}
        tokenizers = {
            name: transformers.CLIPTokenizer.from_pretrained(root / name, local_files_only=True)
            for name in _TOKENIZERS
            if _present(index, name)
        }
        if len(encoders) != len(tokenizers) or not encoders:
            raise FailedPreconditionError(
                f"{root} has the text encoders {sorted(encoders)} and the tokenizers {sorted(tokenizers)}; "
                "each encoder needs its own tokenizer.",
                reason="WEIGHTS_UNAVAILABLE",
            )
        self._tokenizers = tokenizers
        self._pipeline = self._family.text_pipeline(TextParts(encoders=encoders, tokenizers=tokenizers), config=index)
        self._mergers = {name: Merger(encoder, what="text encoder") for name, encoder in encoders.items()}
        self._merged: tuple[Any, ...] = ()
        self._timer = ForwardTimer(*encoders.values())
        settings = context.settings
        self._worker = Worker(
            threads=min(settings.threads, _useful_threads(encoders.values())),
            max_waiting=settings.engine.max_waiting,
            turn=context.turn,
            metrics=context.metrics,
        )

    def describe(self, response: control_pb2.DescribeResponse) -> None:
        for tokenizer in self._tokenizers.values():
            response.text_encoder.tokenizers.add(max_tokens=tokenizer.model_max_length)

    async def warm_up(self) -> None:
        request = stage_pb2.EncodeRequest(guidance=True)
        await self._worker.run(lambda: self._run(request, adapters={}, key=()))

    def close(self) -> None:
        self._worker.close()

    async def encode(self, request: stage_pb2.EncodeRequest) -> stage_pb2.EncodeResponse:
        adapters: dict[str, list[tuple[Layers, float]]] = {}
        if request.adapters:
            for name in self._mergers:
                adapters[name] = await self._context.peers.adapters(request.adapters, name)
        key = tuple((ref.name, ref.digest, ref.weight) for ref in request.adapters)
        encoded, response = await self._worker.run(lambda: self._run(request, adapters=adapters, key=key))
        for name, tensor in encoded.items():
            response.conditioning[name].CopyFrom(self._context.store.put(tensor))
        return response

    def _run(
        self, request: stage_pb2.EncodeRequest, *, adapters: dict[str, list[tuple[Layers, float]]], key: tuple[Any, ...]
    ) -> tuple[dict[str, Any], stage_pb2.EncodeResponse]:
        # Tokenizers keep padding and truncation as state, so all use of them is in the one thread that runs this.
        negative = request.negative_prompt if request.HasField("negative_prompt") else None
        response = stage_pb2.EncodeResponse(
            truncated=self._cut(request.prompt), negative_truncated=self._cut(negative or "")
        )
        if request.strict_prompt and (response.truncated or response.negative_truncated):
            longest = min(tokenizer.model_max_length for tokenizer in self._tokenizers.values())
            cut = response.truncated or response.negative_truncated
            raise InvalidRequestError(
                f"The prompt is longer than the {longest} tokens this model reads; {cut!r} would be cut off. Shorten it, "
                "or allow the cut (strict_prompt off).",
                reason="PROMPT_TOO_LONG",
            )
        if key != self._merged:
            self._merged = (None,)
            for name, merger in self._mergers.items():
                parts = adapters.get(name, [])
                for (layers, _), ref_key in zip(parts, key, strict=False):
                    merger.check(str(ref_key[0]), layers)
                merger.apply(parts)
            self._merged = key
        self._timer.take()
        encoded = self._family.encode(
            self._pipeline,
            prompt=request.prompt,
            negative_prompt=negative,
            guidance=request.guidance,
            device=self._context.device,
        )
        response.forward_ns = self._timer.take()
        return encoded, response

    def _encoder(self, root: Any, name: str, index: dict[str, Any]) -> Any:
        cls = str(index[name][1])
        if cls not in _CLASSES:
            raise FailedPreconditionError(
                f"{root / name} is a {cls}; this server runs {' and '.join(sorted(_CLASSES))}.",
                reason="UNSUPPORTED_FAMILY",
            )
        encoder = getattr(transformers, cls).from_pretrained(
            root / name, dtype=self._context.dtype, use_safetensors=True, local_files_only=True
        )
        return encoder.to(self._context.device).eval()

    def _cut(self, text: str) -> str:
        """What the tightest tokenizer does not take of a text."""
        cut = ""
        for tokenizer in self._tokenizers.values():
            ids = tokenizer(text, truncation=False, padding=False).input_ids
            room = tokenizer.model_max_length
            if len(ids) > room:
                # The end marker keeps its place, so one token less of the text fits.
                lost = tokenizer.decode(ids[room - 1 : -1])
                cut = max(cut, str(lost), key=len)
        return cut


def _useful_threads(encoders: Iterable[Any]) -> int:
    """How many threads can help: the pass of a small encoder is over before a second one has woken up."""
    parameters: int = sum(p.numel() for encoder in encoders for p in encoder.parameters())
    return max(1, parameters // _PARAMETERS_A_THREAD)


def _present(index: dict[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
