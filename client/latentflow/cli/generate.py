"""`latentflow generate`: generates images, writes them as PNG files, and shows a progress bar meanwhile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from latentflow import pngmeta, requests
from latentflow.cli import options
from latentflow.cli import output as output_files
from latentflow.client import Client
from latentflow.errors import InvalidRequestError
from latentflow.pngmeta import Recipe
from latentflow.requests import ControlImage
from latentflow.results import Accepted, Collector, ImageReady, Result
from latentflow.results import Progress as StepDone
from latentflow.v1 import generation_pb2

_stderr = Console(stderr=True)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text that describes the image. Optional with --like.")] = None,
    workflow: options.Workflow = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="PNG file to write. The names of several images get -0, -1, … before the suffix."
        ),
    ] = Path("out.png"),
    negative: Annotated[
        str | None, typer.Option("--negative", help="Text that describes what the image should not contain.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels, such as 64x64.", show_default="the workflow's")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", help="Denoising steps; with some samplers the bar counts more.", show_default="the workflow's"
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="Guidance scale; 1 or less turns guidance off.", show_default="the workflow's"),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="Name of a sampler; `latentflow describe` lists them.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed gives the same image.", show_default="random")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", min=1, help="Number of images; image i has the seed SEED + i.")
    ] = 1,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            "-c",
            help="NAME=FILE[:SCALE]: control image for the ControlNet NAME, or for the net NAME/NET of one that has several. "
            "May be repeated with other names.",
        ),
    ] = None,
    guess_mode: Annotated[
        bool,
        typer.Option(
            "--guess-mode",
            help="The ControlNets act as in diffusers' guess mode: the image follows the control images without a prompt.",
        ),
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", "-l", help="NAME[:WEIGHT]: apply a LoRA. May be repeated with other names."),
    ] = None,
    lora_async_steps: Annotated[
        int | None,
        typer.Option(
            "--lora-async-steps",
            min=0,
            help="Steps that may run before the LoRAs are loaded; 0: the image is exact. Default: the workflow's.",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            exists=True,
            dir_okay=False,
            help="PNG file of an earlier image: use its settings, except those given as options.",
        ),
    ] = None,
    strict_prompt: Annotated[
        bool, typer.Option("--strict-prompt", help="Fail if the prompt is too long, instead of cutting it.")
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Make the same bits whatever else the servers run; it costs throughput.",
        ),
    ] = False,
    target: options.Target = None,
    kube: options.Kube = False,
    namespace: options.Namespace = None,
    timeout: options.Timeout = 600.0,
    api_key: options.ApiKey = None,
    tls_ca: options.TlsCa = None,
    as_json: options.Json = False,
) -> None:
    """Generate images from a prompt and write them as PNG files, which contain the settings that generated them."""
    recipe = pngmeta.read(like) if like else None
    arguments: dict[str, Any] = recipe.arguments() if recipe else {}
    width, height = _size(size)
    given = {
        "negative_prompt": negative,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "seed": seed,
        "loras": _loras(lora) if lora else None,
        "lora_async_steps": lora_async_steps,
    }
    arguments |= {name: value for name, value in given.items() if value is not None}
    arguments["control_images"] = _controls(control or [], recipe, guess_mode=guess_mode)
    text = prompt if prompt is not None else (recipe.prompt if recipe else None)
    if text is None:
        raise InvalidRequestError(
            "There is no prompt: use `latentflow generate PROMPT`, or --like FILE with an earlier image."
        )
    recorded = arguments.pop("workflow", None)
    wanted = workflow if workflow is not None else recorded
    request = requests.build(
        text, workflow=wanted, images=images, strict_prompt=strict_prompt, deterministic=deterministic, **arguments
    )
    files = output_files.paths(output, images=images)
    with options.client(
        target, timeout=timeout, api_key=api_key, tls_ca=tls_ca, kube=kube, namespace=namespace, workflow=wanted
    ) as (client, named):
        request.workflow = named or ""
        result = _run(client, request, quiet=as_json)
    for path, ready in zip(files, result.ready, strict=True):
        output_files.write(path, pngmeta.written(ready.png, pngmeta.recipe(request, result, ready)))
    _warn(result, recipe)
    if as_json:
        print(json.dumps(_document(result, files)))
    else:
        for path in files:
            print(path)


def _run(client: Client, request: generation_pb2.GenerateRequest, *, quiet: bool) -> Result:
    """The result of a request; shows a progress bar on stderr meanwhile."""
    collector = Collector()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_stderr, disable=quiet, transient=False) as bar:
        task = bar.add_task("waiting", total=None)
        done: dict[int, int] = {}
        for one in client.send(request):
            collector.take(one)
            if isinstance(one, Accepted):
                bar.update(task, description=f"denoising, seed {one.seed}")
            elif isinstance(one, StepDone):
                done[one.image] = one.step
                bar.update(task, completed=sum(done.values()), total=one.total * request.images)
            elif isinstance(one, ImageReady):
                bar.update(task, description=f"image {one.image + 1} of {request.images} is ready")
    return collector.result()


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", text)
    if match is None:
        raise InvalidRequestError(f"--size {text!r} is not a size; write WIDTHxHEIGHT, such as 64x64.")
    return int(match[1]), int(match[2])


def _loras(texts: list[str]) -> dict[str, float]:
    loras: dict[str, float] = {}
    for text in texts:
        name, weight = _lora(text)
        if not name:
            raise InvalidRequestError(f"--lora {text!r}: write NAME or NAME:WEIGHT.")
        if name in loras:
            raise InvalidRequestError(f"--lora {text!r}: the LoRA {name!r} is given twice; give it once.")
        loras[name] = weight
    return loras


def _lora(text: str) -> tuple[str, float]:
    """Name and weight. The last colon separates them if a number follows it; otherwise it is part of the name."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def _controls(texts: list[str], recipe: Recipe | None, *, guess_mode: bool) -> dict[str, ControlImage]:
    controls: dict[str, ControlImage] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or not name or not rest:
            raise InvalidRequestError(f"--control {text!r}: write NAME=FILE or NAME=FILE:SCALE.")
        if name in controls:
            raise InvalidRequestError(f"--control {text!r}: the ControlNet {name!r} is given twice; give it once.")
        path, colon, scale = rest.rpartition(":")
        strength, start, end = recipe.control_settings.get(name, (1.0, 0.0, 1.0)) if recipe else (1.0, 0.0, 1.0)
        try:
            strength, path = (float(scale), path) if colon and not Path(rest).exists() else (strength, rest)
        except ValueError:
            raise InvalidRequestError(f"--control {text!r}: the file {rest!r} does not exist.") from None
        guesses = guess_mode or (recipe is not None and name in recipe.guess_mode)
        controls[name] = ControlImage(image=path, scale=strength, start=start, end=end, guess_mode=guesses)
    missing = sorted(set(recipe.control_images) - controls.keys()) if recipe else []
    if missing:
        raise InvalidRequestError(
            f"The image was generated with a control image for {', '.join(missing)}, which its PNG does not contain; "
            f"pass it with --control {missing[0]}=FILE."
        )
    return controls


def _warn(result: Result, recipe: Recipe | None) -> None:
    if result.done.truncated or result.done.negative_truncated:
        cut = result.done.truncated or result.done.negative_truncated
        _stderr.print(
            f"[yellow]The prompt was too long, and this part was ignored:[/] {cut!r}", highlight=False, soft_wrap=True
        )
    changed = [
        used.name
        for used in result.done.models
        if recipe and recipe.digests.get(used.name) not in (None, used.content_digest)
    ]
    if changed:
        _stderr.print(
            f"[yellow]The weights of {', '.join(changed)} differ from those that generated the earlier image,[/] "
            "so the image may differ.",
            highlight=False,
            soft_wrap=True,
        )


def _document(result: Result, files: list[Path]) -> dict[str, Any]:
    done = result.done
    return {
        "files": [str(path) for path in files],
        "request_id": result.accepted.request_id,
        "workflow": result.accepted.workflow,
        "seeds": [ready.seed for ready in result.ready],
        "settings": {
            "width": done.width,
            "height": done.height,
            "steps": done.steps,
            "guidance_scale": done.guidance_scale,
            "sampler": done.sampler,
        },
        "seconds": {"total": done.total, "queued": done.queued},
        "stages": [vars(stage) for stage in done.stages],
        "models": [vars(used) for used in done.models],
        "truncated": done.truncated,
    }
