"""The command line against a served workflow, as a user types it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from latentflow_local.runtime import Runtime
from PIL import Image
from support.paths import EXAMPLES

pytestmark = pytest.mark.asyncio(loop_scope="session")
PROGRAM = str(Path(sys.executable).parent / "latentflow")


async def run(runtime: Runtime, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *arguments,
        env={"LATENTFLOW_TARGET": runtime.target, "PATH": "", "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode or 0, out.decode(), err.decode()


async def test_an_image_is_reproduced_from_the_metadata_of_its_png(runtime: Runtime, tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    arguments = ["--steps", "5", "--lora", "neon:0.6", "--seed", "12", "--sampler", "euler", "-o", str(first)]
    code, out, err = await run(runtime, "generate", "a green square, gray background", *arguments)
    assert (code, out.strip()) == (0, str(first))
    assert "5/5" in err
    code, _, _ = await run(runtime, "generate", "--like", str(first), "-o", str(second))
    assert code == 0
    with Image.open(first) as a, Image.open(second) as b:
        assert a.tobytes() == b.tobytes()


async def test_a_control_image_in_guess_mode_is_reproduced_from_a_png(runtime: Runtime, tmp_path: Path) -> None:
    star = f"edges={EXAMPLES / 'star.png'}"
    for name, *options in (
        ("a", "--seed", "4", "-c", f"{star}:0.9", "--guess-mode"),
        ("plain", "--seed", "4", "-c", f"{star}:0.9"),
        ("again", "--like", str(tmp_path / "a.png"), "-c", star),
    ):
        arguments = [*options, "--steps", "4", "-o", str(tmp_path / f"{name}.png")]
        assert (await run(runtime, "generate", "a star", *arguments))[0] == 0
    made, plain, again = ((tmp_path / f"{name}.png") for name in ("a", "plain", "again"))
    with Image.open(made) as a, Image.open(plain) as b, Image.open(again) as c:
        assert a.tobytes() == c.tobytes()
        assert a.tobytes() != b.tobytes()


async def test_with_json_output_a_command_prints_one_document(runtime: Runtime, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    code, out, err = await run(
        runtime, "generate", "a red star", "--images", "2", "--steps", "2", "--json", "-o", str(output)
    )
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["files"] == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    assert document["seeds"][1] == document["seeds"][0] + 1
    assert {stage["stage"] for stage in document["stages"]} == {"encode", "denoise", "decode"}
    assert all(len(used["content_digest"]) == 64 for used in document["models"])


async def test_describe_and_models_list_limits_and_ready_replicas(runtime: Runtime) -> None:
    code, described, _ = await run(runtime, "describe", "--json")
    assert code == 0
    assert json.loads(described)["limits"]["size_multiple"] == 8
    code, listed, _ = await run(runtime, "models", "--json")
    assert code == 0
    assert [model["ready_replicas"] for model in json.loads(listed)] == [1] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "-w", "nope"], "The gateway has no workflow 'default/nope'"),
        (["generate", "x", "--size", "65x64"], "width must be a multiple of 8"),
        (["generate", "x", "--size", "big"], "is not a size"),
        (["generate", "x", "--guidance", "nan"], "The guidance scale must be a finite number"),
        (["generate", "x", "--steps", "0"], "steps must be from 1"),
        (["generate", "x", "--lora", "nope"], "LoRA store 'styles' has no LoRA 'nope'; it has neon, outline, pastel"),
        (["generate", "x", "--lora", "nope:v2:0.5"], "has no LoRA 'nope:v2'"),
        (["generate", "x", "--lora", "neon:v2"], "has no LoRA 'neon:v2'"),
        (["generate", "x", "--lora", ":0.5"], "--lora ':0.5': write NAME or NAME:WEIGHT."),
        (["generate", "x", "--lora", "neon:101"], "The weight of the LoRA 'neon' must be from -100 to 100"),
        (["generate", "x", "-l", "neon", "-l", "neon:0.5"], "--lora 'neon:0.5': the LoRA 'neon' is given twice"),
        (["generate", "x", "-c", "edges=/a.png", "-c", "edges=/b.png"], "the ControlNet 'edges' is given twice"),
        (["generate", "x", "--control", "edges=/absent.png"], "cannot be read: /absent.png"),
        (["generate", "a red circle " * 30, "--strict-prompt"], "would be cut off"),
        (["generate"], "There is no prompt"),
        (["describe", "--workflow", "nope"], "The gateway has no workflow"),
        (["validate", "/absent.yaml"], "cannot be read"),
    ],
)
async def test_a_mistake_produces_one_message_and_no_traceback(
    runtime: Runtime, arguments: list[str], message: str
) -> None:
    code, _, err = await run(runtime, *arguments)
    assert code == 1
    assert message in " ".join(err.split())
    assert "Traceback" not in err
