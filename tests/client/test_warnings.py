"""The warnings of `latentflow validate`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentflow.api import DiffusionWorkflow, Role, load_workflows
from latentflow.cli import folders, warnings
from latentflow.errors import DataLossError
from latentflow.internal import weight_files
from support.paths import EXAMPLES, ROOT

MODELS = ROOT / "models"
SHAPES = MODELS / "shapes"


def workflow(**base: Any) -> DiffusionWorkflow:
    """The smallest example with another denoiser."""
    (one,) = load_workflows(EXAMPLES / "shapes-minimal.yaml")
    body = one.model_dump(mode="json", by_alias=True, exclude_none=True)
    next(model for model in body["spec"]["models"] if model["role"] == "Denoiser").update(base)
    return DiffusionWorkflow.model_validate(body)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_examples_have_no_warning_about_devices(path: Path) -> None:
    for one in load_workflows(path):
        assert warnings.of(one, model_root=None) == []


@pytest.mark.parametrize(
    ("base", "warning"),
    [
        ({"engine": {"device": "cuda"}}, "models[base].resources: the model runs on cuda and requests no device"),
        (
            {"engine": {"device": "cuda:1"}, "resources": {"limits": {"cpu": 1, "memory": "8Gi"}}},
            "models[base].resources: the model runs on cuda:1 and requests no device",
        ),
        (
            {"resources": {"limits": {"nvidia.com/gpu": 1}}},
            "models[base].engine.device: the model requests nvidia.com/gpu and runs on the CPU",
        ),
        (
            {
                "engine": {"device": "cuda"},
                "parallelism": {"tensor": 4},
                "resources": {"limits": {"cpu": 8, "nvidia.com/gpu": 2}},
            },
            "models[base].resources: the weights are divided among 4 devices (parallelism.tensor), and the model requests 2,",
        ),
        (
            {"engine": {"device": "cuda"}, "parallelism": {"tensor": 2}},
            "models[base].resources: the model runs on cuda and",
        ),
        ({"source": {"uri": "absent"}}, f"models[base].source.uri: {MODELS}/absent does not exist"),
        (
            {"source": {"uri": "shapes", "subfolder": "absent"}},
            f"models[base].source.subfolder: {MODELS}/shapes/absent does not exist",
        ),
    ],
)
def test_a_probable_mistake_is_reported_with_its_field(base: dict[str, Any], warning: str) -> None:
    (found,) = warnings.of(workflow(**base), model_root=MODELS)
    assert found.startswith(warning)


@pytest.mark.parametrize(
    "resources", [{"limits": {"nvidia.com/gpu": 1}}, {"limits": {"amd.com/gpu": 1}}, {"claims": [{"name": "gpu"}]}]
)
def test_a_model_that_requests_a_device_for_cuda_has_no_warning(resources: dict[str, Any]) -> None:
    assert warnings.of(workflow(engine={"device": "cuda"}, resources=resources), model_root=MODELS) == []


@pytest.mark.parametrize(
    "base",
    [
        {"engine": {"device": "cuda"}, "resources": {"limits": {"nvidia.com/gpu": "2"}}},
        {"engine": {"device": "cuda"}, "resources": {"claims": [{"name": "gpus"}]}},
        {},
    ],
)
def test_a_divided_model_that_requests_enough_devices_has_no_warning(base: dict[str, Any]) -> None:
    assert warnings.of(workflow(parallelism={"tensor": 2}, **base), model_root=MODELS) == []


def test_weights_of_pipelines_of_different_classes_are_reported(tmp_path: Path) -> None:
    for folder, name in (("shapes", "StableDiffusionPipeline"), ("large", "StableDiffusionXLPipeline")):
        shutil.copytree(SHAPES, tmp_path / folder)
        index = json.loads((SHAPES / "model_index.json").read_bytes())
        (tmp_path / folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    (found,) = warnings.of(workflow(source={"uri": "large"}), model_root=tmp_path)
    assert "text, pixels of a StableDiffusionPipeline and base of a StableDiffusionXLPipeline" in found


@pytest.mark.parametrize(
    ("file", "warning"),
    [
        ("shapes", None),
        ("shapes/unet/absent.safetensors", "source.uri: {root}/shapes/unet/absent.safetensors does not exist"),
        ("shape", "source.uri: {root}/shape does not exist; did you mean {root}/shapes?"),
        (
            "absent/shapes",
            "source.uri: this machine has no {root}/absent, so {root}/absent/shapes was not checked; the machine or",
        ),
    ],
)
def test_a_file_source_is_checked_where_this_machine_has_its_folder(
    tmp_path: Path, file: str, warning: str | None
) -> None:
    (tmp_path / "shapes").symlink_to(SHAPES)
    one = workflow(source={"uri": f"file://{tmp_path}/{file}"})
    found = warnings.of(one, model_root=None)
    assert len(found) == (warning is not None)
    for text in found:
        assert text.startswith(f"models[base].{warning}".format(root=tmp_path))
    assert all("file://" not in clause for clause in warnings.unchecked(one, model_root=None))


def test_what_a_folder_of_a_file_source_lacks_is_reported(tmp_path: Path) -> None:
    shutil.copytree(SHAPES, tmp_path / "my shapes")
    remove(tmp_path / "my shapes/scheduler/scheduler_config.json")
    (found,) = warnings.of(workflow(source={"uri": f"file://{tmp_path}/my%20shapes"}), model_root=None)
    assert found.startswith(f"models[base].source: {tmp_path}/my shapes/scheduler/scheduler_config.json is missing")


def test_a_file_source_in_a_volume_of_the_pod_is_listed_as_not_checked() -> None:
    pod = {"volumeMounts": [{"name": "weights", "mountPath": "/absent/weights"}]}
    one = workflow(source={"uri": "file:///absent/weights/castle"}, pod=pod)
    assert warnings.of(one, model_root=None) == []
    assert "whether file:///absent/weights/castle can be read" in warnings.unchecked(one, model_root=None)


def test_the_nearest_name_is_suggested_for_a_missing_subfolder() -> None:
    (found,) = warnings.of(workflow(source={"uri": "shapes", "subfolder": "unnet"}), model_root=MODELS)
    assert found == f"models[base].source.subfolder: {SHAPES}/unnet does not exist; did you mean {SHAPES}/unet?"


def test_a_link_out_of_the_model_root_is_reported_as_servers_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    shutil.copytree(SHAPES, tmp_path / "elsewhere")
    (tmp_path / "root/shapes").symlink_to(tmp_path / "elsewhere")
    found = warnings.of(workflow(), model_root=tmp_path / "root")
    assert len(found) == 3
    assert f"{tmp_path}/root/shapes is a link to {tmp_path}/elsewhere, outside the model root" in found[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_this_user_may_not_read_is_no_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (found,) = warnings.of(workflow(source={"uri": f"file://{tmp_path}/closed/castle"}), model_root=None)
    assert "castle was not checked" in found


@pytest.mark.parametrize(
    ("uri", "warning"),
    [
        ("hf://org/repo", None),
        ("hf://org/SD_1.5-repo.v2", None),
        ("hf://org/repo/blob.safetensors", None),
        ("hf://huggingface.co/repo", "huggingface.co is the address of the hub; write hf://ORGANISATION/repo"),
        ("hf://org/repo.git", "'repo.git' in hf://org/repo.git is no name on a hub"),
        ("hf://org/a--b", "'a--b' in hf://org/a--b is no name on a hub"),
        ("hf://org/.repo", "'.repo' in hf://org/.repo is no name on a hub"),
        (
            "hf://org/repo/blob/main/a/b.safetensors",
            "blob/main is part of the address of a web page; write hf://org/repo/a/b.safetensors and revision: main",
        ),
        (
            "hf://org/repo/resolve/v2/b.safetensors",
            "resolve/v2 is part of the address of a web page; write hf://org/repo/b.safetensors and revision: v2",
        ),
    ],
)
def test_a_hub_source_that_is_probably_mistyped_is_reported(uri: str, warning: str | None) -> None:
    found = warnings.of(workflow(source={"uri": uri}), model_root=None)
    assert [text.startswith(f"models[base].source.uri: {warning}") for text in found] == ([True] if warning else [])


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("stabilityai/sd-turbo", "; for the repository of a hub, write hf://stabilityai/sd-turbo"),
        ("huggingface.co/stabilityai/sd-turbo", "; for the repository of a hub, write hf://stabilityai/sd-turbo"),
        ("models/shapes", "; a uri begins below the model root: write shapes"),
        ("~/models/castle", "; ~ and variables are not expanded"),
        ("file:///$HOME/models/castle", "; ~ and variables are not expanded"),
        ("shapes/castle", " does not exist"),
    ],
)
def test_what_a_missing_source_was_meant_to_be_is_suggested(uri: str, words: str) -> None:
    (found,) = warnings.of(workflow(source={"uri": uri}), model_root=MODELS)
    assert found.startswith("models[base].source.uri: ")
    assert found.endswith(words)


@pytest.mark.parametrize(
    "uri", ["shapes/loras/neon/pytorch_lora_weights.safetensors", "hf://org/repo/neon.safetensors"]
)
def test_a_lora_store_whose_source_is_a_file_is_reported(uri: str) -> None:
    (one,) = load_workflows(EXAMPLES / "shapes-minimal.yaml")
    body = one.model_dump(mode="json", by_alias=True, exclude_none=True)
    body["spec"]["models"].append({"name": "styles", "role": "LoRAStore", "attachTo": "base", "source": {"uri": uri}})
    (found,) = warnings.of(DiffusionWorkflow.model_validate(body), model_root=MODELS)
    assert (
        found
        == f"models[styles].source.uri: {uri} is a file, and a LoRA store reads a folder; name the folder of the file"
    )


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html></html>")


def refusal_of_a_hub(path: Path) -> None:
    path.write_text('{"error": "Unauthorized"}')


def renamed_pickle(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(60))


def pickled(path: Path) -> None:
    path.rename(path.with_suffix(".bin"))


def half(path: Path) -> None:
    path.rename(path.with_suffix(".fp16.safetensors"))


def shards(path: Path) -> None:
    path.unlink()
    index = {"metadata": {}, "weight_map": {"a": path.name.replace(".", "-00001-of-00001.")}}
    path.with_name(path.name + ".index.json").write_text(json.dumps(index))


NETWORK = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "how", "model", "words"),
    [
        ("vae", remove, "pixels", "The component folder {file} is missing"),
        ("vae/config.json", remove, "pixels", "{file} is missing"),
        (f"vae/{NETWORK}", remove, "pixels", "vae holds no *.safetensors file"),
        (f"vae/{NETWORK}", truncate, "pixels", "{file} is damaged or incomplete (its header describes "),
        (f"vae/{NETWORK}", lengthen, "pixels", "{file} is damaged or incomplete (its header describes "),
        (f"unet/{NETWORK}", pointer, "base", "{file} is a pointer of Git LFS instead of the weights"),
        (f"unet/{NETWORK}", web_page, "base", "{file} is a web page instead of the weights"),
        (f"unet/{NETWORK}", refusal_of_a_hub, "base", "{file} is JSON text instead of the weights"),
        (f"unet/{NETWORK}", renamed_pickle, "base", "{file} is a pickle or a ZIP archive by its content"),
        (f"unet/{NETWORK}", pickled, "base", "holds a pickle (diffusion_pytorch_model.bin)"),
        (f"unet/{NETWORK}", half, "base", "Set source.variant: fp16"),
        (f"unet/{NETWORK}", shards, "base", "diffusion_pytorch_model-00001-of-00001.safetensors, which"),
        ("scheduler/scheduler_config.json", remove, "base", "{file} is missing"),
        ("text_encoder/model.safetensors", truncate, "text", "{file} is damaged or incomplete"),
        ("tokenizer/tokenizer_config.json", remove, "text", "tokenizer lacks tokenizer_config.json"),
        ("tokenizer", remove, "text", "tokenizer holds no tokenizer"),
    ],
)
def test_what_a_model_folder_lacks_is_reported_by_the_role_that_reads_it(
    tmp_path: Path, file: str, how: Callable[[Path], None], model: str, words: str
) -> None:
    shutil.copytree(SHAPES, tmp_path / "shapes")
    path = tmp_path / "shapes" / file
    how(path)
    (found,) = warnings.of(workflow(), model_root=tmp_path)
    assert found.startswith(f"models[{model}].source: ")
    assert words.format(file=path) in found


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("shapes*.yaml")), ids=lambda path: path.name)
def test_the_folders_of_the_examples_have_no_problem(path: Path) -> None:
    for one in load_workflows(path):
        assert warnings.of(one, model_root=MODELS) == []


def test_component_folders_and_single_files_are_checked(tmp_path: Path) -> None:
    shutil.copytree(SHAPES / "unet", tmp_path / "net")
    shutil.copy(SHAPES / "scheduler/scheduler_config.json", tmp_path / "net")
    shutil.copytree(SHAPES / "text_encoder", tmp_path / "encoder")
    shutil.copy(SHAPES / f"vae/{NETWORK}", tmp_path / "all.safetensors")
    shutil.copy(SHAPES / "vae/config.json", tmp_path)
    problems = partial(folders.problems, subfolder=None, variant=None)
    assert problems(Role.DENOISER, tmp_path / "net") == []
    (missing,) = problems(Role.TEXT_ENCODER, tmp_path / "encoder")
    assert "encoder holds no tokenizer" in missing
    assert problems(Role.VAE, tmp_path / "all.safetensors") == []
    truncate(tmp_path / "all.safetensors")
    broken, missing = problems(Role.TEXT_ENCODER, tmp_path / "all.safetensors")
    assert "all.safetensors is damaged or incomplete" in broken
    assert "tokenizer holds no tokenizer" in missing
    assert problems(Role.LORA_STORE, tmp_path / "net") == []
    (tmp_path / "all.ckpt").write_bytes(b"x")
    (pickle,) = problems(Role.VAE, tmp_path / "all.ckpt")
    assert "all.ckpt is a pickle. Weights load from safetensors only" in pickle


@pytest.mark.parametrize("role", [Role.TEXT_ENCODER, Role.DENOISER, Role.CONTROL_NET, Role.VAE])
def test_a_pickle_that_a_source_names_is_reported_as_one(tmp_path: Path, role: Role) -> None:
    shutil.copy(SHAPES / f"vae/{NETWORK}", tmp_path / "new.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"x")
    found = folders.problems(role, tmp_path / "old.ckpt", subfolder=None, variant=None)[0]
    assert found.startswith(f"{tmp_path}/old.ckpt is a pickle. ")
    assert found.endswith("'Convert a pickle' in docs/weights.md has a program that converts it.")
    assert "## Convert a pickle" in (ROOT / "docs/weights.md").read_text()


def test_a_file_that_is_no_folder_of_weights_is_reported_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "net.gguf").write_bytes(b"x")
    (tmp_path / "net.safetensors").write_bytes(b"x")
    (other,) = folders.problems(Role.VAE, tmp_path / "net.gguf", subfolder=None, variant=None)
    assert "net.gguf is no *.safetensors file" in other
    (named,) = folders.problems(Role.VAE, tmp_path, subfolder="net.safetensors", variant=None)
    assert "net.safetensors is a file, and source.subfolder names a folder. Name the file in the uri." in named


@pytest.mark.parametrize(
    ("role", "part"),
    [
        (Role.TEXT_ENCODER, "text_encoder"),
        (Role.DENOISER, "unet"),
        (Role.CONTROL_NET, "controlnet"),
        (Role.VAE, "vae"),
    ],
)
def test_single_files_that_a_server_of_the_role_refuses_are_reported(tmp_path: Path, role: Role, part: str) -> None:
    shutil.copytree(SHAPES / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "part.safetensors"
    shutil.copy(SHAPES / f"vae/{NETWORK}", file)
    (found,) = folders.problems(role, file, subfolder=None, variant=None)
    assert f"{file} is not a file of a whole model, and there is no {part}/config.json beside it" in found
    (tmp_path / part).mkdir()
    (tmp_path / part / "config.json").write_text("{}")
    assert folders.problems(role, file, subfolder=None, variant=None) == []
    header = b'{"lora_unet_mid.lora_up.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    (found,) = folders.problems(role, file, subfolder=None, variant=None)
    assert f"{file} is a LoRA (key lora_unet_mid.lora_up.weight). Put it into the folder of a LoRA store" in found


def test_damaged_files_of_a_lora_store_are_reported(tmp_path: Path) -> None:
    neon = SHAPES / "loras/neon/pytorch_lora_weights.safetensors"
    for name in ("good.safetensors", "short.SAFETENSORS", "saved/adapter_model.safetensors", ".hidden.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(neon, tmp_path / name)
    for name in ("short.SAFETENSORS", ".hidden.safetensors"):
        truncate(tmp_path / name)
    pointer(tmp_path / "saved/adapter_model.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    saved, short = folders.problems(Role.LORA_STORE, tmp_path, subfolder=None, variant=None)
    assert saved.startswith(f"{tmp_path}/saved/adapter_model.safetensors is a pointer of Git LFS")
    assert short.startswith(f"{tmp_path}/short.SAFETENSORS is damaged or incomplete")


@pytest.mark.parametrize(
    ("role", "subfolder", "words"),
    [
        (Role.VAE, "unet", "shapes/unet is of the class UNet2DConditionModel, which this role does not serve"),
        (Role.DENOISER, "vae", "shapes/vae is of the class AutoencoderKL, which this role does not serve"),
        (Role.CONTROL_NET, "unet", "shapes/unet is of the class UNet2DConditionModel, which this role does not serve"),
        (Role.TEXT_ENCODER, "unet", "shapes/unet is no text encoder of its pipeline"),
    ],
)
def test_a_subfolder_that_another_role_serves_is_reported(role: Role, subfolder: str, words: str) -> None:
    (found,) = folders.problems(role, SHAPES, subfolder=subfolder, variant=None)
    assert words in found


def test_a_single_file_has_no_variant_also_where_the_folder_is_named(tmp_path: Path) -> None:
    shutil.copy(SHAPES / f"vae/{NETWORK}", tmp_path / "all.safetensors")
    shutil.copy(SHAPES / "vae/config.json", tmp_path)
    (found,) = folders.problems(Role.VAE, tmp_path, subfolder=None, variant="fp16")
    assert found == f"{tmp_path}/all.safetensors is a single file and has no variant. Remove source.variant."


@given(st.binary(max_size=200))
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        # Half of the space of files that this covers has a complete header, which is no JSON object with tensors.
        for start in (b"", len(content).to_bytes(8, "little")):
            path.write_bytes(start + content)
            with pytest.raises(DataLossError):
                weight_files.check_size(path)


def test_the_command_prints_warnings_and_ends_well(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "latentflow"), "validate", f"--model-root={tmp_path}"]
    ended = subprocess.run(
        [*command, str(EXAMPLES / "shapes-minimal.yaml")], capture_output=True, text=True, check=True
    )
    assert ended.stdout.count(f"warning: models[text].source.uri: {tmp_path}/shapes does not exist") == 1
    assert "not checked" not in ended.stdout
    document = subprocess.run(
        [*command, "--json", str(EXAMPLES / "shapes-minimal.yaml")], capture_output=True, text=True, check=True
    )
    assert len(json.loads(document.stdout)["warnings"]["default/shapes-minimal"]) == 3


def test_sources_that_were_not_looked_for_are_listed(tmp_path: Path) -> None:
    remote = workflow(source={"uri": "hf://org/repo"})
    assert warnings.unchecked(remote, model_root=None) == [
        "whether the model root contains shapes; --model-root FOLDER checks this",
        "whether hf://org/repo can be read",
    ]
    assert warnings.unchecked(remote, model_root=tmp_path) == ["whether hf://org/repo can be read"]
    command = [str(Path(sys.executable).parent / "latentflow"), "validate", str(EXAMPLES / "shapes-minimal.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "  not checked: whether the model root contains shapes; --model-root FOLDER checks this\n" in ended.stdout
