"""Specs that are refused and specs that are accepted: one table for `latentflow validate` and for the API server.

`words` are in the refusals of both. Where the two messages differ (a type's name, a list of values), they are the words that
both messages contain.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

BASE: dict[str, Any] = {
    "task": "TextToImage",
    "models": [
        {"name": "text", "role": "TextEncoder", "source": {"uri": "shapes"}},
        {"name": "base", "role": "Denoiser", "source": {"uri": "shapes"}},
        {
            "name": "edges",
            "role": "ControlNet",
            "attachTo": "base",
            "source": {"uri": "shapes", "subfolder": "controlnet-edges"},
        },
        {"name": "styles", "role": "LoRAStore", "attachTo": "base", "source": {"uri": "shapes", "subfolder": "loras"}},
        {"name": "pixels", "role": "VAE", "source": {"uri": "shapes"}},
    ],
}
TEXT, DENOISER, EDGES, STYLES, PIXELS = range(5)
REMOVE = object()
COLOCATED = BASE["models"][EDGES] | {"placement": "Colocated"}


@dataclass(frozen=True)
class Case:
    """A change of `BASE`: the value at a path of keys and indices, or `REMOVE`."""

    name: str
    path: tuple[str | int, ...]
    value: Any
    words: str = ""

    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = copy.deepcopy(BASE)
        *way, last = self.path
        place: Any = spec
        for key in way:
            if isinstance(key, str) and key not in place:
                place[key] = {}
            place = place[key]
        if self.value is REMOVE:
            del place[last]
        elif last == "+":
            place.append(self.value)
        else:
            place[last] = self.value
        return spec


def _model(index: int, *path: str | int) -> tuple[str | int, ...]:
    return ("models", index, *path)


BAD = [
    Case("no models", ("models",), [], "models"),
    Case("models absent", ("models",), REMOVE, "models"),
    Case("no text encoder", _model(TEXT), {"name": "x", "role": "ControlNet", "attachTo": "base", "source": {"uri": "a"}}, "no model has the role TextEncoder"),
    Case("no denoiser", _model(DENOISER), {"name": "base2", "role": "ControlNet", "attachTo": "base2", "source": {"uri": "a"}}, "no model has the role Denoiser"),
    Case("no vae", _model(PIXELS), REMOVE, "no model has the role VAE; a workflow needs exactly one"),
    Case("two vaes", ("models", "+"), {"name": "pixels2", "role": "VAE", "source": {"uri": "a"}}, "several models have the role VAE"),
    Case("two denoisers", ("models", "+"), {"name": "base2", "role": "Denoiser", "source": {"uri": "a"}}, "several models have the role Denoiser"),
    Case("two text encoders", ("models", "+"), {"name": "t2", "role": "TextEncoder", "source": {"uri": "a"}}, "several models have the role TextEncoder"),
    Case("two lora stores", ("models", "+"), {"name": "s2", "role": "LoRAStore", "attachTo": "base", "source": {"uri": "a"}}, "a denoiser takes one"),
    Case("two models of one name", ("models", "+"), {"name": "edges", "role": "ControlNet", "attachTo": "base", "source": {"uri": "a"}}, "edges"),
    Case("unknown role", _model(PIXELS, "role"), "Vae", "role"),
    Case("role absent", _model(PIXELS, "role"), REMOVE, "role"),
    Case("name absent", _model(PIXELS, "name"), REMOVE, "name"),
    Case("name in capitals", _model(PIXELS, "name"), "Pixels", "name"),
    Case("name too long", _model(PIXELS, "name"), "p" * 64, "name"),
    Case("attachTo names no model", _model(EDGES, "attachTo"), "absent", "names no denoiser of this workflow"),
    Case("attachTo names a vae", _model(EDGES, "attachTo"), "pixels", "names no denoiser of this workflow"),
    Case("controlnet unattached", _model(EDGES, "attachTo"), REMOVE, "model 'edges' is a ControlNet and needs attachTo, the name of its denoiser"),
    Case("lora store unattached", _model(STYLES, "attachTo"), REMOVE, "model 'styles' is a LoRAStore and needs attachTo"),
    Case("vae attached", _model(PIXELS, "attachTo"), "base", "model 'pixels' is a VAE; attachTo is for ControlNets and LoRA stores"),
    Case("neither source nor modelRef", _model(PIXELS, "source"), REMOVE, "model 'pixels' needs exactly one of source and modelRef"),
    Case("source and modelRef", _model(PIXELS, "modelRef"), "vae-1", "model 'pixels' needs exactly one of source and modelRef"),
    Case("uri absent", _model(PIXELS, "source"), {"subfolder": "vae"}, "uri"),
    Case("uri empty", _model(PIXELS, "source", "uri"), "", "uri"),
    Case("unknown scheme", _model(PIXELS, "source", "uri"), "ftp://x/y", "the scheme 'ftp' is unknown; use a folder under the model root or file://"),
    Case("absolute path without scheme", _model(PIXELS, "source", "uri"), "/models/shapes", "a relative URI stays under the model root; write file:///"),
    Case("out of the model root", _model(PIXELS, "source", "uri"), "../shapes", "a relative URI stays under the model root"),
    Case("out of the model root midway", _model(PIXELS, "source", "uri"), "a/../../b", "a relative URI stays under the model root"),
    Case("file without a root", _model(PIXELS, "source", "uri"), "file://models/shapes", "a file URI names an absolute path: file:///abs/path, with three slashes"),
    Case("file of another machine", _model(PIXELS, "source", "uri"), "file://server/models/shapes", "a file URI names an absolute path: file:///abs/path, with three slashes"),
    Case("file with a query", _model(PIXELS, "source", "uri"), "file:///models/what?", "? and # end the path of a URI; write %3F and %23 for those of a folder's name"),
    Case("claim with a fragment", _model(PIXELS, "source", "uri"), "pvc://claim/models#1", "? and # end the path of a URI; write %3F and %23 for those of a folder's name"),
    Case("hub without a repository", _model(PIXELS, "source", "uri"), "hf://only", "a hub URI names organisation and repository, hf://org/repo, or a file of it"),
    Case("hub with too much", _model(PIXELS, "source", "uri"), "hf://a/b/c", "a hub URI names organisation and repository"),
    Case("hub file out of its repository", _model(PIXELS, "source", "uri"), "hf://a/b/../c.safetensors", "a hub URI names organisation and repository"),
    Case("a variant of a single file", _model(PIXELS, "source"), {"uri": "a/b.safetensors", "variant": "fp16"}, "a single file has neither a subfolder nor a variant; remove them"),
    Case("a subfolder of a single file", _model(PIXELS, "source"), {"uri": "s3://a/b.safetensors", "subfolder": "vae"}, "a single file has neither a subfolder nor a variant; remove them"),
    Case("claim without a name", _model(PIXELS, "source", "uri"), "pvc:///shapes", "names nothing after pvc://"),
    Case("out of the claim", _model(PIXELS, "source", "uri"), "pvc://claim/../../etc", "a pvc URI names a path inside the claim, without '..'"),
    Case("out of the claim, escaped", _model(PIXELS, "source", "uri"), "pvc://claim/a/%2e.%2F..", "a pvc URI names a path inside the claim, without '..'"),
    Case("bucket without a name", _model(PIXELS, "source", "uri"), "s3://", "names nothing after s3://"),
    Case("subfolder leads out", _model(STYLES, "source", "subfolder"), "../loras", "a subfolder is a relative path inside the source, without '..'"),
    Case("subfolder absolute", _model(STYLES, "source", "subfolder"), "/loras", "a subfolder is a relative path inside the source"),
    Case("subfolder empty", _model(STYLES, "source", "subfolder"), "", "a subfolder is a relative path inside the source"),
    Case("revision of a folder", _model(PIXELS, "source", "revision"), "main", "only hf:// sources have a revision; remove it"),
    Case("unknown dtype", _model(PIXELS, "dtype"), "float8", "dtype"),
    Case("unknown device", _model(PIXELS, "engine"), {"device": "tpu"}, "device"),
    Case("no threads", _model(PIXELS, "engine"), {"threads": 0}, "threads"),
    Case("a device number of three digits", _model(PIXELS, "engine"), {"device": "cuda:100"}, "device"),
    Case("no request may run", _model(DENOISER, "engine"), {"maxRunning": 0}, "maxRunning"),
    Case("shared passes for a lora store", _model(STYLES, "engine"), {"maxRunning": 2}, "engine.maxRunning is an option of TextEncoder, Denoiser, ControlNet, VAE, not of LoRAStore; remove it"),
    Case("threads for a lora store", _model(STYLES, "engine"), {"threads": 2}, "engine.threads is an option of TextEncoder, Denoiser, ControlNet, VAE, not of LoRAStore; remove it"),
    Case("an unknown engine option", _model(DENOISER, "engine"), {"speed": 2}, "speed"),
    Case("minimum above maximum", _model(DENOISER, "scaling"), {"minReplicas": 3, "maxReplicas": 2}, "minReplicas is above maxReplicas; swap or raise one"),
    Case("minimum above the default maximum", _model(DENOISER, "scaling"), {"minReplicas": 2}, "minReplicas is above maxReplicas"),
    Case("negative replicas", _model(DENOISER, "scaling"), {"minReplicas": -1}, "minReplicas"),
    Case("a maximum of no replicas", _model(DENOISER, "scaling"), {"minReplicas": 0, "maxReplicas": 0}, "maxReplicas"),
    Case("unknown scaling mode", _model(DENOISER, "scaling"), {"mode": "Manual"}, "mode"),
    Case("latent degree of three", _model(DENOISER, "parallelism"), {"latent": 3}, "latent"),
    Case("latent degree in words", _model(DENOISER, "parallelism"), {"latent": "Two"}, "latent"),
    Case("no tensor degree", _model(DENOISER, "parallelism"), {"tensor": 0}, "tensor"),
    Case("tensor degree of seventeen", _model(DENOISER, "parallelism"), {"tensor": 17}, "tensor"),
    Case("a divided vae", _model(PIXELS, "parallelism"), {"tensor": 2}, "parallelism.tensor is for a Denoiser, not for a VAE; remove it"),
    Case("context degree of eight", _model(DENOISER, "parallelism"), {"context": 8}, "context: this version serves only Auto and 1"),
    Case("tensor degree in words", _model(DENOISER, "parallelism"), {"tensor": "auto"}, "tensor"),
    Case("context degree of nine", _model(DENOISER, "parallelism"), {"context": 9}, "context"),
    Case("shared devices", _model(DENOISER, "devices"), "Shared", "devices: this version serves only Exclusive"),
    Case("unknown devices", _model(DENOISER, "devices"), "Many", "devices"),
    Case("unknown rollout", _model(DENOISER, "rollout"), "Recreate", "rollout"),
    Case("nets of a denoiser", _model(DENOISER, "nets"), [{"name": "a", "source": {"uri": "b"}}], "only a ControlNet has nets, a Denoiser has none; remove them"),
    Case("two nets of one name", _model(EDGES, "nets"), [{"name": "a", "source": {"uri": "b"}}, {"name": "a", "source": {"uri": "c"}}], "nets"),
    Case("a net without a source", _model(EDGES, "nets"), [{"name": "a"}], "source"),
    Case("a net of an unknown scheme", _model(EDGES, "nets"), [{"name": "a", "source": {"uri": "ftp://b"}}], "the scheme 'ftp' is unknown"),
    Case("no net", _model(EDGES, "nets"), [], "nets"),
    Case("a compiled denoiser", _model(DENOISER, "engine"), {"compile": True}, "compile: this version serves only false"),
    Case("a step cache", _model(DENOISER, "engine"), {"stepCache": "Auto"}, "stepCache: this version serves only None"),
    Case("an unknown step cache", _model(DENOISER, "engine"), {"stepCache": "On"}, "stepCache"),
    Case("too many asynchronous steps", _model(STYLES, "engine"), {"asyncSteps": 1001}, "asyncSteps"),
    Case("a variant of a lora store", _model(STYLES, "source", "variant"), "fp16", "the files of a LoRAStore have no variants; remove source.variant"),
    Case("a variant with a path", _model(DENOISER, "source", "variant"), "../fp16", "variant"),
    Case("parts of a pipeline", _model(TEXT, "source", "parts"), ["text_encoder_3"], "parts: not served by this version; remove it"),
    Case("images from images", ("task",), "ImageToImage", "task: this version serves only TextToImage"),
    Case("inpainting", ("task",), "Inpainting", "task: this version serves only TextToImage"),
    Case("a label of the operator", _model(DENOISER, "pod"), {"labels": {"latentflow.io/model": "other"}}, "labels that the operator sets cannot be passed through"),
    Case("a component label", _model(DENOISER, "pod"), {"labels": {"app.kubernetes.io/component": "x"}}, "labels that the operator sets cannot be passed through"),
    Case("a label that is a number", _model(DENOISER, "pod"), {"labels": {"a": 1}}, "labels"),
    Case("a priority above the range", ("slo",), {"latencyScale": 2, "priority": 101}, "priority"),
    Case("degrading to no step", ("slo",), {"latencyScale": 2, "degrade": {"minSteps": 0}}, "minSteps"),
    Case("an unknown editing cache", ("editing",), {"cache": "On"}, "cache"),
    Case("unknown placement", _model(EDGES, "placement"), "Near", "placement"),
    Case("the placement of earlier versions", _model(EDGES, "placement"), "Together", "Colocated"),
    Case("a denoiser in its own pod", _model(DENOISER, "placement"), "Colocated", "model 'base' is the denoiser, in whose pods the others may run; remove its placement"),
    Case("in one pod by reference", _model(PIXELS), {"name": "pixels", "role": "VAE", "modelRef": "vae-1", "placement": "Colocated"}, "model 'pixels' is a modelRef, which has its own pods; Colocated needs a source"),
    Case("in one pod with bounds of its own", _model(EDGES), COLOCATED | {"scaling": {"maxReplicas": 2}}, "model 'edges' is Colocated with the denoiser and scales with it; set scaling on the denoiser"),
    Case("in one pod that scales to zero alone", _model(EDGES), COLOCATED | {"scaling": {"minReplicas": 0}}, "model 'edges' is Colocated with the denoiser and scales with it"),
    Case("in one pod and External", _model(EDGES), COLOCATED | {"scaling": {"mode": "External"}}, "model 'edges' is Colocated with the denoiser and scales with it"),
    Case("in one pod with a rollout of its own", _model(EDGES), COLOCATED | {"rollout": "Replace"}, "model 'edges' is Colocated with the denoiser in its pods; set rollout on the denoiser"),
    Case("in one pod with a node of its own", _model(EDGES), COLOCATED | {"pod": {"nodeSelector": {"zone": "a"}}}, "model 'edges' is Colocated with the denoiser in its pods; set pod on the denoiser"),
    Case("in one pod with variables of its own", _model(EDGES), COLOCATED | {"pod": {"env": [{"name": "A", "value": "1"}]}}, "model 'edges' is Colocated with the denoiser in its pods"),
    Case("in the pod of a denoiser by reference", ("models",), [BASE["models"][TEXT], {"name": "base", "role": "Denoiser", "modelRef": "denoiser-1"}, COLOCATED, BASE["models"][PIXELS]], "is a modelRef, whose pods this workflow does not own; give it a source, or remove placement Colocated from the other models"),
    Case("unknown task", ("task",), "TextToVideo", "task"),
    Case("no steps", ("defaults",), {"steps": 0}, "steps"),
    Case("absurd steps", ("defaults",), {"steps": 100_000}, "steps"),
    Case("steps in words", ("defaults",), {"steps": "many"}, "steps"),
    Case("width no multiple of eight", ("defaults",), {"width": 65}, "width"),
    Case("no height", ("defaults",), {"height": 0}, "height"),
    Case("negative guidance", ("defaults",), {"guidanceScale": -1}, "guidanceScale"),
    Case("two deadlines", ("slo",), {"latencyScale": 2, "latencySeconds": 3}, "slo needs exactly one of latencyScale and latencySeconds"),
    Case("no deadline", ("slo",), {"attainment": 0.5}, "slo needs exactly one of latencyScale and latencySeconds"),
    Case("deadline before the end", ("slo",), {"latencyScale": 1}, "latencyScale"),
    Case("attainment above one", ("slo",), {"latencyScale": 2, "attainment": 1.5}, "attainment"),
    Case("a typo in a key", _model(PIXELS, "sorce"), {"uri": "a"}, "sorce"),
    Case("stages are reserved", ("stages",), [], "stages"),
]  # fmt: skip

GOOD = [
    Case("the base unchanged", ("task",), "TextToImage"),
    Case("only the required models", ("models",), [BASE["models"][TEXT], BASE["models"][DENOISER], BASE["models"][PIXELS]]),
    Case("a model by reference", _model(PIXELS), {"name": "pixels", "role": "VAE", "modelRef": "vae-70af7f4ce5"}),
    Case("absolute file", _model(PIXELS, "source", "uri"), "file:///data/models/shapes"),
    Case("file with spaces and dots", _model(PIXELS, "source", "uri"), "file:///data/my models/v1..2"),
    Case("file of this machine by name", _model(PIXELS, "source", "uri"), "file://localhost/data/models/shapes"),
    Case("file with escapes", _model(PIXELS, "source", "uri"), "file:///data/my%20models/what%3F"),
    Case("a variant", _model(DENOISER, "source", "variant"), "fp16"),
    Case("a claim", _model(PIXELS, "source", "uri"), "pvc://weights/shapes"),
    Case("a claim's root", _model(PIXELS, "source", "uri"), "pvc://weights"),
    Case("a hub repository", _model(PIXELS, "source"), {"uri": "hf://stabilityai/sdxl-turbo", "revision": "main"}),
    Case("a hub repository with dots", _model(PIXELS, "source", "uri"), "hf://my.org/sd-1.5_x"),
    Case("a single file of a hub", _model(PIXELS, "source"), {"uri": "hf://org/repo/ckpt/v1.5_x.safetensors", "revision": "main"}),
    Case("a single file of a bucket", _model(PIXELS, "source", "uri"), "s3://bucket/a/b.safetensors"),
    Case("a bucket", _model(PIXELS, "source", "uri"), "s3://bucket/a/b/c"),
    Case("an image", _model(PIXELS, "source", "uri"), "oci://registry.example.com/models/shapes"),
    Case("a folder below", _model(PIXELS, "source", "uri"), "family/shapes"),
    Case("a folder with dots in its name", _model(PIXELS, "source", "uri"), "a..b/..c"),
    Case("scale to zero", _model(DENOISER, "scaling"), {"minReplicas": 0, "maxReplicas": 4}),
    Case("always one replica", _model(DENOISER, "scaling"), {"minReplicas": 1, "maxReplicas": 1}),
    Case("External scaling", _model(DENOISER, "scaling"), {"mode": "External", "maxReplicas": 1000}),
    Case("latent degree of two", _model(DENOISER, "parallelism"), {"latent": 2}),
    Case("latent degree Auto", _model(DENOISER, "parallelism"), {"latent": "Auto"}),
    Case("tensor degree of two", _model(DENOISER, "parallelism"), {"tensor": 2}),
    Case("a vae with the tensor degree Auto", _model(PIXELS, "parallelism"), {"tensor": "Auto"}),
    Case("every degree Auto", _model(DENOISER, "parallelism"), {"latent": "Auto", "tensor": "Auto", "context": "Auto"}),
    Case("a replacing rollout", _model(DENOISER, "rollout"), "Replace"),
    Case("asynchronous adapters", _model(STYLES, "engine"), {"asyncSteps": 4}),
    Case("every reserved field at its default", _model(DENOISER), BASE["models"][DENOISER] | {"devices": "Exclusive", "rollout": "Surge", "engine": {"compile": False, "stepCache": "None"}}),
    Case("every field of slo", ("slo",), {"latencySeconds": 3, "priority": 100, "degrade": {"minSteps": 8}}),
    Case("an editing cache", ("editing",), {"cache": "Auto"}),
    Case("no editing cache", ("editing",), {"cache": "None"}),
    Case("labels and annotations of pods", _model(DENOISER, "pod"), {"labels": {"kueue.x-k8s.io/queue-name": "images", "app.kubernetes.io/part-of": "art"}, "annotations": {"sidecar.istio.io/inject": "false"}}),
    Case("gates, account and more of pods", _model(DENOISER, "pod"), {"schedulingGates": [{"name": "example.com/quota"}], "serviceAccountName": "gpu", "schedulerName": "fair", "hostUsers": False, "dnsConfig": {"nameservers": ["192.0.2.1"]}, "initContainers": [{"name": "a", "image": "b"}]}),
    Case("in one pod", _model(EDGES, "placement"), "Colocated"),
    Case("all in one pod", ("models",), [model | ({"placement": "Colocated"} if i != DENOISER else {}) for i, model in enumerate(BASE["models"])]),
    Case("in one pod with explicit defaults", _model(EDGES), COLOCATED | {"scaling": {"minReplicas": 1}, "pod": {}, "resources": {"limits": {"cpu": "1"}}}),
    Case("several nets", _model(EDGES, "nets"), [{"name": name, "source": {"uri": f"hf://org/{name}", "revision": "main"}} for name in ("a", "b")]),
    Case("a gpu", _model(DENOISER, "resources"), {"limits": {"nvidia.com/gpu": 1, "memory": "16Gi"}}),
    Case("half precision on a gpu", _model(DENOISER), BASE["models"][DENOISER] | {"dtype": "bfloat16", "engine": {"device": "cuda"}}),
    Case("the second gpu", _model(DENOISER, "engine"), {"device": "cuda:1", "threads": 2, "maxRunning": 64, "maxWaiting": 0}),
    Case("an option of another role at its default", _model(STYLES, "engine"), {"device": "cpu", "maxRunning": 4, "maxWaiting": 64}),
    Case("pod overrides", _model(DENOISER, "pod"), {"nodeSelector": {"zone": "a"}, "tolerations": [{"operator": "Exists"}], "env": [{"name": "A", "value": "1"}]}),
    Case("the longest name", _model(PIXELS, "name"), "p" * 63),
    Case("a name of one character", _model(PIXELS, "name"), "p"),
    Case("guidance off", ("defaults",), {"guidanceScale": 0, "steps": 1, "width": 8, "height": 8192}),
    Case("a deadline in seconds", ("slo",), {"latencySeconds": 0.5, "attainment": 1}),
    Case("a second controlnet of the same weights", ("models", "+"), {"name": "edges2", "role": "ControlNet", "attachTo": "base", "source": {"uri": "shapes", "subfolder": "controlnet-edges"}}),
]  # fmt: skip
