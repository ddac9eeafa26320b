"""`latentflow up --device cuda` serves a whole workflow on one GPU, and its image is plain diffusers' own."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from latentflow import Client, ControlImage
from support.packs import MODELS, SHAPES
from support.paths import EXAMPLES
from support.reference import reference
from support.stack import Request

from gpucheck.parity import edges
from gpucheck.report import Report

_PIXELS = 2.0
# A small machine without a GPU imports the servers' libraries for minutes where it is busy.
_READY_SECONDS = {"cuda": 120.0, "cpu": 480.0}
_UP = "from latentflow.cli import main; main()"
_REPEATS = 5


def run(report: Report, device: str) -> None:
    with report.case("served"):
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
        request = Request(
            seed=11, steps=20, guidance_scale=3.0, controls=[("edges", edges(), 1.0)], loras=[("outline", 0.8)]
        )
        began = time.monotonic()
        with _up(device) as target, Client(target, timeout=60) as client:
            report.figure("ready after", time.monotonic() - began, "s")

            def generate() -> np.ndarray:
                result = client.generate(
                    request.prompt,
                    steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    seed=request.seed,
                    width=request.side,
                    height=request.side,
                    control_images={name: ControlImage(image=image, scale=s) for name, image, s in request.controls},
                    loras=dict(request.loras),
                )
                return np.asarray(result.image.convert("RGB"), dtype=int)

            made = generate()
            if device == "cuda":
                report.figure("GPU memory of the servers", (free - torch.cuda.mem_get_info()[0]) / 2**30, "GiB")
            times = []
            for _ in range(_REPEATS):
                started = time.perf_counter()
                generate()
                times.append(time.perf_counter() - started)
            report.figure("request with ControlNet and LoRA", sorted(times)[len(times) // 2] * 1e3, "ms")
        _, expected = reference(SHAPES, request, device=device)
        difference = np.abs(made - np.asarray(expected.convert("RGB"), dtype=int))
        report.at_most("image, largest difference", float(difference.max()), _PIXELS, "of 255")


@contextmanager
def _up(device: str) -> Iterator[str]:
    """The gateway's address, when all is ready."""
    command = [
        "up",
        "--device",
        device,
        "--model-root",
        str(MODELS),
        "--listen",
        "127.0.0.1:0",
        "--http-listen",
        "none",
    ]
    command += ["--threads", "1", str(EXAMPLES / "shapes.yaml")]
    process = subprocess.Popen(
        [sys.executable, "-c", _UP, *command],
        env=os.environ | {"COLUMNS": "400", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield _target(process, seconds=_READY_SECONDS[device])
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        process.kill()
        process.wait()


def _target(process: subprocess.Popen[str], *, seconds: float) -> str:
    """Waits for the line that names the gateway; all that is printed goes to this process's output."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + seconds
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"The servers were not ready after {seconds:g} s.") from None
        if line is None:
            raise RuntimeError("`latentflow up` ended before its servers were ready.")
        if "--target " in line:
            return line.split("--target ")[1].split()[0]
