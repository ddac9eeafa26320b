"""`make demo`: serves examples/shapes.yaml on this machine, generates one image with a ControlNet and a LoRA, and ends."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from latentflow import AsyncClient, ControlImage, results
from latentflow.api import load_workflows
from latentflow_local.runtime import run
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

HERE = Path(__file__).parent
OUT = Path("out/demo.png")
PROMPT = "a large red star in the center, white background"
ENLARGED = 6


async def demo() -> None:
    console = Console()
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        workflows = load_workflows(HERE / "shapes.yaml")
        count = len(workflows[0].spec.models) + 1
        starting = bar.add_task("starting model servers", total=count)
        async with run(
            workflows,
            model_root=HERE.parent / "models",
            listen="127.0.0.1:0",
            log_level="WARNING",
            on_change=lambda one: bar.update(starting, advance=one.state == "ready"),
        ) as runtime:
            await runtime.supervisor.wait_ready(300)
            ready = time.monotonic()
            steps = bar.add_task("denoising", total=None)
            async with AsyncClient(runtime.target, timeout=300) as client:
                async for event in client.stream(
                    PROMPT,
                    control_images={"edges": ControlImage(image=HERE / "star.png", scale=1.0)},
                    loras={"outline": 0.8},
                    seed=11,
                ):
                    if isinstance(event, results.Progress):
                        bar.update(steps, completed=event.step, total=event.total)
                    if isinstance(event, results.ImageReady):
                        OUT.parent.mkdir(exist_ok=True)
                        OUT.write_bytes(event.png)
                        finished = time.monotonic()
    large = OUT.with_stem("demo-large")
    with Image.open(OUT) as image:
        image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST).save(large)
    console.print(f"{PROMPT!r}, along the outline of a star, in the style of the LoRA 'outline'")
    console.print(f"servers ready after {ready - started:.1f} s, image {finished - ready:.1f} s later")
    console.print(f"[bold]{OUT}[/] (64x64), and enlarged: [bold]{large}[/]", highlight=False)


if __name__ == "__main__":
    asyncio.run(demo())
