"""What a LoRA file says about each layer is applied; a file that says anything else is refused by the name of its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latentflow.errors import FailedPreconditionError
from latentflow.reasons import Reason
from latentflow_nodes.adapters import folder, lora, patterns
from latentflow_nodes.adapters.layers import Layer
from latentflow_nodes.adapters.lora import Adapter
from latentflow_nodes.adapters.merger import Merger
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from support.adapters import Tensors, save

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
DOTTED = "unet.mid_block.attentions.0.proj_in"
KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
PEFT = "base_model.model.mid_block.attentions.0.proj_in"


def tensors(layer: str, *, rank: int = 2, inner: int = 8, a: str = "lora_A", b: str = "lora_B") -> Tensors:
    return {f"{layer}.{a}.weight": torch.ones(rank, inner), f"{layer}.{b}.weight": torch.ones(inner, rank)}


def kohya(layer: str = KOHYA, *, rank: int = 2) -> Tensors:
    return tensors(layer, rank=rank, a="lora_down", b="lora_up")


def read(path: Path) -> Adapter:
    """The adapter of a file, or of a folder."""
    return lora.load(folder.find(path.parent, COMPONENTS)[path.name.removesuffix(".safetensors")])


def refusal(path: Path) -> str:
    """The one sentence why a file is refused, which names it."""
    with pytest.raises(FailedPreconditionError) as caught:
        read(path)
    assert caught.value.reason == Reason.ADAPTER_UNREADABLE
    assert caught.value.message.startswith(path.name)
    assert caught.value.message.endswith(".")
    return caught.value.message


def in_folder(path: Path, state: Tensors, config: dict[str, Any] | str | None) -> Path:
    """A folder as PEFT writes it."""
    path.mkdir()
    save(path / "adapter_model.safetensors", state)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (path / "adapter_config.json").write_text(text)
    return path


def test_each_layer_of_a_kohya_file_has_its_own_alpha_or_its_rank(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = kohya("lora_unet_a", rank=4) | kohya("lora_unet_b", rank=2) | kohya("lora_te_c", rank=8)
    save(path, state | {"lora_unet_a.alpha": torch.tensor(1.0), "lora_unet_b.alpha": torch.tensor(3)})
    components = read(path).components
    strengths = {name: layer.alpha / layer.rank for layers in components.values() for name, layer in layers.items()}
    assert strengths == {"a": 0.25, "b": 1.5, "c": 1.0}
    assert set(components) == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({f"{KOHYA}.dora_scale": torch.ones(8, 1)}, "a DoRA"),
        ({f"{DOTTED}.lora_magnitude_vector": torch.ones(8)}, "a DoRA"),
        ({f"{DOTTED}.magnitude": torch.ones(8)}, "a DoRA"),
        ({f"{KOHYA}.hada_w1_a": torch.ones(8, 2)}, "a LoHa"),
        ({f"{KOHYA}.lokr_w1": torch.ones(8, 2)}, "a LoKr"),
        ({"oft_unet_x.oft_blocks": torch.ones(8, 2)}, "an OFT"),
        ({f"{KOHYA}.oft_diag": torch.ones(8, 2)}, "an OFT"),
        ({f"{KOHYA}.on_input": torch.tensor(True)}, "an IA3"),
        ({f"{KOHYA}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "a LoCon with Tucker decomposition"),
        ({f"{KOHYA}.a1.weight": torch.ones(2, 2)}, "a GLoRA"),
        ({f"{KOHYA}.diff": torch.ones(8, 8)}, "a full difference of weights"),
        ({f"{KOHYA}.diff_b": torch.ones(8)}, "a full difference of weights"),
        ({f"{KOHYA}.w_norm": torch.ones(8)}, "a full difference of weights"),
        ({f"{DOTTED}.lora_B.bias": torch.ones(8)}, "a LoRA with biases"),
        ({"bundle_emb.me.string_to_param.*": torch.ones(1, 8)}, "a textual-inversion embedding"),
        ({"bundle_emb.ema yasuhara.clip_l": torch.ones(1, 8)}, "a textual-inversion embedding"),
        ({"unet.output_blocks.5.1.transformer_blocks.1.ff.net.2.dora_scale": torch.ones(1, 8)}, "a DoRA"),
        ({"emb_params": torch.ones(1, 8)}, "a textual-inversion embedding"),
        ({"clip_l": torch.ones(1, 8)}, "a textual-inversion embedding"),
        ({"lora_controlnet": torch.ones(1)}, "a Control-LoRA"),
        ({"model.diffusion_model.out.2.weight": torch.ones(1)}, "a checkpoint of a whole model"),
        ({"control_model.input_blocks.0.0.weight": torch.ones(1)}, "a ControlNet"),
        ({"ip_adapter.1.to_k_ip.weight": torch.ones(1)}, "an IP-Adapter"),
        ({"<cat-toy>": torch.ones(1, 768)}, "a textual-inversion embedding"),
        (kohya("down_blocks.0.motion_modules.0.temporal_transformer.proj_in"), "a LoRA of motion modules, which make"),
        ({"lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight": torch.ones(2, 8)}, "a ControlNet-LLLite"),
    ],
)
def test_a_file_of_another_method_is_refused_by_its_name(tmp_path: Path, extra: Tensors, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    save(path, kohya() | extra)
    message = refusal(path)
    assert f" is or contains {kind}" in message
    assert f"(key {next(iter(extra))})" in message


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (kohya() | {"lora_unet_b.alpha": torch.tensor(1.0)}, "has only alpha of the layer b"),
        (kohya() | {f"{KOHYA}.scalar": torch.tensor(1.0)}, f"such as {KOHYA}.scalar"),
        (kohya() | {f"{KOHYA}.scalar": torch.tensor(1.0)}, "keys of the unet that are no part of a LoRA layer"),
        (
            kohya() | {f"{KOHYA}.scalar": torch.tensor(1.0)},
            "keys that end with .lora_down.weight, .lora_up.weight or .alpha",
        ),
        (kohya() | {"stray": torch.ones(1)}, "keys of no component that a LoRA can change, such as stray."),
        ({f"{KOHYA}.lora_down.weight": torch.ones(2, 8)}, "has only A of the layer"),
        (tensors(DOTTED) | {f"{DOTTED}.lora_A.weight": torch.ones(3, 8)}, "whose ranks differ"),
        (tensors(DOTTED) | {f"{DOTTED}.lora_A.weight": torch.full((2, 8), torch.nan)}, "values that are not finite"),
        (kohya() | {f"{KOHYA}.alpha": torch.tensor(torch.inf)}, "values that are not finite"),
        (kohya() | {f"{KOHYA}.alpha": torch.tensor(1e300, dtype=torch.float64)}, "values that are not finite"),
        (
            kohya() | {f"{KOHYA}.alpha": torch.ones(2)},
            "alpha of the shape [2] and the type torch.float32 in the layer mid",
        ),
        (kohya() | {f"{KOHYA}.alpha": torch.tensor(1j)}, "the type torch.complex64 in the layer mid_block"),
        (kohya() | {f"{KOHYA}.alpha": torch.tensor(True)}, "the type torch.bool in the layer mid_block"),
        (tensors(DOTTED, rank=0), "[8, 0] in the layer mid_block.attentions.0.proj_in, which hold no values"),
        (tensors(DOTTED) | {f"{DOTTED}.lora_B.weight": torch.ones(0, 2)}, "which hold no values"),
        (tensors(DOTTED) | {f"{DOTTED}.lora_A.weight": torch.ones(8)}, "and each needs at least two dimensions"),
        (tensors(DOTTED) | {f"{DOTTED}.lora_B.weight": torch.ones(8, 1, 2, 1)}, "whose ranks differ"),
        (tensors(DOTTED) | {f"{DOTTED}.lora_B.weight": torch.ones(8, 2, 2, 1)}, "where only A may have a kernel"),
        (tensors(DOTTED, inner=1, rank=1) | {f"{DOTTED}.lora_A.weight": torch.ones(1, 1, dtype=torch.int8)}, "int8"),
        ({key: value.to(torch.float8_e8m0fnu) for key, value in tensors(DOTTED).items()}, "type F8_E8M0; convert it"),
        (tensors(DOTTED) | {f"{DOTTED}.lora_A.weight": torch.ones(2, 8, dtype=torch.int8)}, "torch.int8"),
        (tensors(DOTTED) | kohya("unet.mid_block.attentions.0.proj_in"), "twice"),
        ({"transformer.x.lora_A.weight": torch.ones(2, 8)}, "such as transformer.x.lora_A.weight"),
        (kohya("lora_transformer_x"), "such as lora_transformer_x.lora_down.weight"),
        (kohya("lora_prior_unet_x"), "such as lora_prior_unet_x.lora_down.weight"),
        (kohya("lycoris_mid_block_x"), "such as lycoris_mid_block_x.lora_down.weight"),
        (kohya("diffusion_model.input_blocks.1.1.proj_in"), "such as diffusion_model.input_blocks.1.1.proj_in"),
        (tensors(DOTTED, a="lora_A.default", b="lora_B.default"), f"such as {DOTTED}.lora_A.default.weight"),
        (tensors("mid_block.attentions.0.proj_in"), "its pipeline, or put unet. before each key."),
        (tensors("text_model.encoder.layers.0.mlp.fc1"), "its pipeline, or put text_encoder. before each key."),
        ({"conv_in.weight": torch.ones(8, 4, 3, 3)}, "has whole weights of a unet, such as conv_in.weight, and not"),
        (
            {"text_model.final_layer_norm.weight": torch.ones(8)},
            "has whole weights of a text_encoder, such as text_model",
        ),
        (
            kohya() | {"mid_block.resnets.0.norm1.weight": torch.ones(8)},
            "has whole weights of a unet, such as mid_block",
        ),
        (tensors("transformer.blocks.0.proj"), "keys that begin with one of unet., lora_unet_, text_encoder."),
        (tensors(f"unet.{PEFT}"), "its adapter_config.json, which has the alpha, is not beside it"),
        (kohya() | kohya("diffusion_model_x"), "such as diffusion_model_x.lora_down.weight"),
        ({"unet:0:up": torch.ones(8, 2), "unet:0:down": torch.ones(2, 8)}, "such as unet:0:down"),
        (tensors(PEFT), "its adapter_config.json, which has the alpha, is not beside it"),
        ({}, "has no tensors"),
    ],
)
def test_a_file_with_a_key_of_no_use_is_refused(tmp_path: Path, state: Tensors, message: str) -> None:
    path = tmp_path / "a.safetensors"
    save(path, state)
    assert message in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_values_of_a_type_that_no_model_runs_in_are_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {key: tensor.to(dtype) for key, tensor in tensors(DOTTED).items()})
    (layer,) = read(path).components["unet"].values()
    assert (layer.a.dtype, layer.b.dtype) == (torch.float32, torch.float32)
    b, a = layer.factors(torch.device("cpu"))
    assert torch.equal(layer.scale * b @ a, torch.full((8, 8), 2.0))


def test_an_alpha_may_have_one_dimension_and_another_type_than_the_matrices(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(
        path,
        {key: one.half() for key, one in kohya().items()} | {f"{KOHYA}.alpha": torch.tensor([3], dtype=torch.int64)},
    )
    (layer,) = read(path).components["unet"].values()
    assert (layer.alpha, layer.a.dtype) == (3.0, torch.float16)


@pytest.mark.parametrize(("text", "message"), [("{", "header is not JSON"), ("[]", "header is no JSON object")])
def test_a_damaged_configuration_in_a_header_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors(DOTTED), path, metadata={"lora_adapter_metadata": text})
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "is no JSON object"), ('{"a":' + "[" * 100_000, "is not JSON (maximum recursion")],
)
def test_a_damaged_configuration_beside_a_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert f"adapter_config.json {message}" in refusal(in_folder(tmp_path / "mine", tensors(PEFT), text))


def test_alphas_beside_a_configuration_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, kohya() | {f"{KOHYA}.alpha": torch.tensor(1.0)}, config={"unet.r": 2, "unet.lora_alpha": 4})
    assert "has alphas in its tensors and in a configuration" in refusal(path)


def test_a_configuration_with_defaults_only_is_a_plain_lora(tmp_path: Path) -> None:
    fields = LoraConfig(r=2, lora_alpha=6, target_modules=["proj_in"]).to_dict() | {"target_modules": ["proj_in"]}
    path = in_folder(tmp_path / "mine", tensors(PEFT), fields)
    (layer,) = read(path).components["unet"].values()
    assert layer.alpha == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "configures the type LOHA"),
        ({"peft_type": "LOKR"}, "configures the type LOKR"),
        ({"peft_type": "IA3"}, "configures the type IA3"),
        (
            {"use_dora": True},
            "configures a DoRA, and this version applies plain LoRA only. Use a plain LoRA, or merge this",
        ),
        ({"lora_bias": True}, "configures a LoRA with biases"),
        ({"bias": "all"}, "configures a LoRA with bias"),
        ({"fan_in_fan_out": True}, "configures a LoRA with fan_in_fan_out"),
        ({"modules_to_save": ["conv_in"]}, "configures a LoRA with modules_to_save"),
        ({"use_qalora": True}, "configures a LoRA with use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changed the base model too"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"r": 4}, "has rank 2, and its configuration has rank 4"),
        ({"rank_pattern": {"proj_in": 7}}, "has rank 2, and its configuration has rank 7"),
        ({"auto_mapping": {"base_model_class": "FluxTransformer2DModel"}}, "was trained on a FluxTransformer2DModel"),
        ({"alpha_pattern": {"(": 1}}, 'has "(" in alpha_pattern, which is no name of layers; write names'),
        ({"alpha_pattern": {"[9-0]": 1}}, "in alpha_pattern, which is no pattern (bad character range 9-0"),
        ({"alpha_pattern": [1]}, "alpha_pattern [1]; it is a JSON object"),
        ({"lora_alpha": float("nan")}, "has NaN as lora_alpha; an alpha is a number of at most 1e+30"),
        ({"lora_alpha": float("inf")}, "has Infinity as lora_alpha; an alpha is"),
        ({"lora_alpha": 10**400}, "… as lora_alpha; an alpha is"),
        ({"lora_alpha": None}, "has null as lora_alpha; an alpha is"),
        ({"lora_alpha": True}, "has true as lora_alpha; an alpha is"),
        ({"lora_alpha": "4"}, 'has "4" as lora_alpha; an alpha is'),
        ({"alpha_pattern": {"proj_in": float("nan")}}, "NaN as a value of alpha_pattern; an alpha is"),
        ({"r": 2.9}, "has 2.9 as r; a rank is a whole number of at least 1"),
        ({"r": True}, "has true as r; a rank is"),
        ({"r": 0}, "has 0 as r; a rank is"),
        ({"rank_pattern": {"proj_in": "2"}}, 'has "2" as a value of rank_pattern; a rank is'),
        ({"use_rslora": "false"}, 'use_rslora "false"; it is true or false'),
        ({"auto_mapping": "x"}, "auto_mapping is no JSON object"),
    ],
)
def test_a_folder_of_peft_that_is_no_plain_lora_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = in_folder(tmp_path / "mine", tensors(PEFT), {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields)
    assert message in refusal(path)


NAMES = ("mid_block.attentions.0.to_q", "down.12.conv1", "to_q", "my_to_q", "down.1.to_q.x", "a.b.a.b.c")
PATTERNS = (
    "to_q",
    "^to_q",
    ".*to_q",
    r"\.to_q",
    "conv1",
    "down.*conv1$",
    r"^down\.[12]\d\.conv1",
    "d.*",
    ".*",
    "",
    "a.*c",
)


@pytest.mark.parametrize(
    "pattern", [*PATTERNS, "^.*[02].*to_q", "to.q", "b.*b.*c", "b.*b.*b", "a.*a.*b", "[a-d].*1.*", "^"]
)
def test_a_pattern_matches_the_layers_that_peft_matches(pattern: str) -> None:
    ours = [name for name in NAMES if patterns.compiled(pattern).match(name)]
    assert ours == [name for name in NAMES if get_pattern_key([pattern], name) == pattern]


@pytest.mark.parametrize(
    "pattern", [r"(\w+\.?)+to_k", "([a-z0-9_.]+)+!", "a+", "(a|b)", "a|b", ".**", "a{9}", "a.?", "(?i)a"]
)
def test_a_pattern_that_may_take_long_is_refused_by_name(tmp_path: Path, pattern: str) -> None:
    fields = {"r": 2, "lora_alpha": 4, "alpha_pattern": {pattern: 8}}
    message = refusal(in_folder(tmp_path / "mine", tensors(PEFT), fields))
    assert f"{json.dumps(pattern)} in alpha_pattern, which is no name of layers" in message


def test_the_longest_match_of_a_pattern_takes_little_time() -> None:
    # A matcher that backtracks over every place of every part needs more than 10^20 steps for it.
    assert patterns.compiled(".*a" * 20 + "b").match("a." * 500) is None


@pytest.mark.parametrize(
    ("fields", "layer", "component"),
    [
        ({"auto_mapping": {"base_model_class": "UNet2DConditionModel"}}, "mid_block.x", "unet"),
        ({"auto_mapping": {"base_model_class": "CLIPTextModel"}}, "encoder.layers.0.mlp.fc1", "text_encoder"),
        ({"auto_mapping": {"base_model_class": "CLIPTextModelWithProjection"}}, "text_model.x", "text_encoder_2"),
        ({}, "up_blocks.0.resnets.0.conv1", "unet"),
        ({"auto_mapping": None}, "text_model.encoder.layers.0.mlp.fc1", "text_encoder"),
    ],
)
def test_the_component_of_a_folder_of_peft_is_in_its_configuration_or_keys(
    tmp_path: Path, fields: dict[str, Any], layer: str, component: str
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields
    path = in_folder(tmp_path / "mine", tensors(f"base_model.model.{layer}"), config)
    assert {name: list(layers) for name, layers in read(path).components.items()} == {component: [layer]}


def test_the_digest_of_an_adapter_is_over_its_configuration_too(tmp_path: Path) -> None:
    digests = set()
    for alpha in (1, 2):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
        digests.add(read(in_folder(tmp_path / f"mine{alpha}", tensors(PEFT), config)).digest)
    assert len(digests) == 2


def test_an_adapter_that_changes_a_layer_under_two_names_is_refused() -> None:
    merger = Merger(torch.nn.Sequential(torch.nn.Linear(4, 4)), names={"0": "0", "first": "0"}, what="denoiser")
    layer = Layer(a=torch.ones(2, 4), b=torch.ones(4, 2), alpha=2)
    merger.check("fine", {"first": layer})
    with pytest.raises(FailedPreconditionError, match=r"changes layer '0' twice, as '0' and as 'first'"):
        merger.check("twice", {"0": layer, "first": layer})


@pytest.mark.parametrize(("a", "b"), [((2, 5), (4, 2)), ((2, 4), (5, 2)), ((2, 2, 2, 1), (4, 2, 1, 1))])
def test_an_adapter_of_another_shape_is_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    merger = Merger(torch.nn.Sequential(torch.nn.Linear(4, 4)), names={"0": "0"}, what="denoiser")
    with pytest.raises(FailedPreconditionError, match=r"and the layer of this denoiser is \[4, 4\]"):
        merger.check("other", {"0": Layer(a=torch.ones(a), b=torch.ones(b), alpha=2)})
