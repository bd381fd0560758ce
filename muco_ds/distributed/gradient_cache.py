"""Gradient cache: the exact gradient of a contrastive loss over more packs than fit one graph (Gao et al. 2021, arXiv
2101.06983), on every ZeRO stage.

Pass one embeds all packs without a graph; the loss over the gathered batch gives its gradient on each embedding. Pass
two embeds each pack again, with a graph, and sends the kept gradient through it. Memory is that of one pack.

Plain gradient accumulation is no substitute: summing the losses of packs leaves out a pack's negatives in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from muco_ds.errors import UserError

Loss = TypeVar("Loss")


def prepare(engine: Any) -> None:
    """Make a new engine ready for several packs a step.

    Raises:
        UserError: it can't hold back the reduction of gradients until the last pack; on every rank.
    """
    if engine.zero_optimization_stage() > 1 and not _coalesces(engine):
        raise UserError(
            f"DeepSpeed's {type(engine.optimizer).__name__} can't reduce the gradients of several packs at once here "
            f"(ZeRO stage {engine.zero_optimization_stage()}): install deepspeed 0.19.8 or newer",
            on_every_rank=True,
        )
    # The packs' gradients add up in `.grad`, by default in the weights' bf16: with 64 packs 1 % of them were lost.
    for parameter in engine.module.parameters():
        parameter.grad_dtype = engine.get_data_types()[1]


def cached_backward(
    engine: Any,
    forwards: Sequence[Callable[[], torch.Tensor]],
    loss_of: Callable[[list[torch.Tensor]], tuple[torch.Tensor, Loss]],
) -> Loss:
    """Backward of `loss_of` over the outputs of all `forwards`; gradients are reduced once, before `engine.step()`.

    Args:
        engine: a DeepSpeed engine with gradient_accumulation_steps 1.
        forwards: one call of the engine per pack, repeatable: each is called twice, with the same random state.
        loss_of: embeddings of all packs -> (this rank's loss, anything to return). Collective.
    Returns:
        the second value of `loss_of`.
    """
    states, kept = [], []
    with torch.no_grad():
        for forward in forwards:
            states.append(_random_state())
            kept.append(forward().detach().requires_grad_())
    loss, result = loss_of(kept)
    loss.backward()
    with one_reduction(engine) as last:
        for i, (forward, state, emb_ED) in enumerate(zip(forwards, states, kept, strict=True)):
            last(i == len(forwards) - 1)
            _restore(state)
            again_ED = forward()
            # Its gradient with respect to the embeddings is the kept one; a pack without rows still takes part.
            grad_ED = torch.zeros_like(emb_ED) if emb_ED.grad is None else emb_ED.grad
            engine.backward((again_ED * grad_ED).sum())
    return result


@contextmanager
def one_reduction(engine: Any) -> Iterator[Callable[[bool], None]]:
    """Gradients of several backward passes stay local and are averaged over the ranks once.

    Yields:
        what is called before each of them, with whether it is the last.
    """
    if _coalesces(engine):
        with engine.coalesce_grad_reduction():
            yield lambda _last: None
        return
    # Stage 0, and stage 1 in bf16, reduce in the backward pass that is the boundary.
    yield engine.set_gradient_accumulation_boundary
    engine.set_gradient_accumulation_boundary(True)


def _coalesces(engine: Any) -> bool:
    return hasattr(engine, "coalesce_grad_reduction") and hasattr(engine.optimizer, "_coalesce_grad_reduction")


def _random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _restore(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
