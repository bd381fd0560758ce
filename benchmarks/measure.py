"""What the step benchmark asks of a system: its fastest form, rates and split, and whether it does the same work."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from harness import Phases, sample
from systems import System

TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 0.2)}
"""By precision: largest relative differences of losses, and of gradients of a weight. In bfloat16 two ways of adding
the same numbers up differ that much with random weights."""
COMPARED_WEIGHTS = 5
USABLE = 0.92
"""Share of the GPU's memory that a form may be expected to need."""
PHASES = ("vision", "text_forward", "backward", "gather_and_loss", "optimizer", "other")


class ProcessorClock:
    """Seconds that this process's threads spend on a processor in each call: other processes don't lengthen them."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self.seconds: list[float] = []

    def run(self) -> None:
        started = time.process_time()
        self._work()
        self.seconds.append(time.process_time() - started)


def tune(system: System, forms: Sequence[Any]) -> None:
    """Leave the system in its fastest form.

    On a GPU a form is left out whose memory, in proportion to that of one tried before, does not fit: running out of
    it in the middle of a step would leave a ZeRO-3 engine unusable.
    """
    if len(forms) == 1:
        system.use(forms[0])
        return
    seconds: dict[Any, float] = {}
    growth: dict[bool, list[tuple[int, int]]] = {}
    for form in forms:
        system.use(form)
        known = [used / tokens * system.held_tokens for tokens, used in growth.get(form.checkpointing, ())]
        if known and max(known) > _free_bytes():
            continue
        warmup = 1 if torch.cuda.is_available() else 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        seconds[form] = min(sample({"step": system.step}, repeats=1, warmup=warmup)["step"])
        if torch.cuda.is_available():
            used = torch.cuda.max_memory_allocated() - held
            growth.setdefault(form.checkpointing, []).append((system.held_tokens, used))
            torch.cuda.empty_cache()
    system.use(min(seconds, key=seconds.__getitem__))


def _free_bytes() -> float:
    total = torch.cuda.get_device_properties(0).total_memory
    return USABLE * total - torch.cuda.memory_allocated()


def per_second(system: System, seconds: float, images: int, peak: float | None) -> dict[str, Any]:
    """Rates of a system whose step takes so long. `mfu` is null without a sourced peak."""
    rate = system.flops() / seconds
    return {
        "pairs_per_s": _short(system.pairs / seconds),
        "images_per_s": _short(images / seconds),
        "tokens_per_s": _short(system.tokens / seconds),
        "model_gflop": _short(system.flops() / 1e9),
        "gflops": _short(rate / 1e9),
        "mfu": None if peak is None else round(rate / peak, 4),
    }


def split(system: System) -> dict[str, float | None]:
    """Seconds of a step by phase (see `Phases`), and of `data_wait`: how much longer a worker took for the next batch.

    `prepare` is what the worker needed by itself, beside the step, as in a loader.
    """
    context = multiprocessing.get_context("fork")  # nothing is sent but the seconds, as from a loader's worker
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_prepare, args=(system, sender))
    worker.start()
    with Phases() as phases:
        phases.wrap(torch.autograd, "backward", "backward")
        system.watch(phases)
        system.step()
    started = time.perf_counter()
    prepare = receiver.recv()
    waited = time.perf_counter() - started
    worker.join()
    found: dict[str, float | None] = {name: _short(phases.seconds[name]) for name in PHASES}
    return {**found, "data_wait": _short(waited), "prepare": _short(prepare)}


def _prepare(system: System, sender: Any) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    system.prepare()
    sender.send(time.perf_counter() - started)


def agreement(ours: System, theirs: System, precision: str) -> dict[str, Any]:
    """Do two systems compute the same loss, and the same gradients of some weights, on the same weights?"""
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    for system in (ours, theirs):
        loss = float(system.backward())
        gradients = system.gradients()
        if not found:
            names = sorted(gradients)
            names = names[:: max(1, len(names) // COMPARED_WEIGHTS)]
        found.append((loss, {name: gradients[name].detach().to("cpu", torch.float32, copy=True) for name in names}))
        system.update()
    (loss, mine), (their_loss, their) = found
    of_loss = abs(loss - their_loss) / abs(their_loss)
    whole = max(float(gradient.norm()) for gradient in their.values())
    of_gradient = max(
        float((mine[name] - gradient).norm() / gradient.norm().clamp_min(1e-3 * whole))
        for name, gradient in their.items()
    )
    most_loss, most_gradient = TOLERANCE[precision]
    return {
        "loss": loss,
        "loss_difference": float(f"{of_loss:.2g}"),
        "gradient_difference": float(f"{of_gradient:.2g}"),
        "pairs": ours.pairs,
        "same": ours.pairs == theirs.pairs and of_loss <= most_loss and of_gradient <= most_gradient,
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
