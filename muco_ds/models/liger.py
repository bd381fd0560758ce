"""liger-kernel inside stock modules: RMSNorm and SwiGLU in both towers, rotary positions in the text tower.

Each module that is replaced keeps its parameters and their names: it is given a subclass of its stock class with
another `forward`. So weights are still used in the forward of the module that owns them (ZeRO-3 gathers them there),
and linear layers are called as modules (peft wraps them). liger-kernel's own `apply_liger_kernel_to_*` fail to import
with transformers 5.23, or set names that its models don't read.

A module is replaced only if its class is one of those listed here, and only after a trial: for each class and width
the stock forward and ours run on small random inputs, and outputs and gradients must agree. LayerNorm stays torch's,
which is one kernel already. `pointwise.rotated` rotates in the vision tower, in parts of one tensor, and in the
last text layer, whose queries are fewer than its keys: the kernel wants as many.

Shape suffixes: T rows, D hidden size, H query heads, G key/value heads, d head dimension.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from muco_ds.data.segments import separate
from muco_ds.errors import UserError
from muco_ds.models.last_layer import LastLayer

log = logging.getLogger(__name__)

Kernels = Literal["auto", "liger", "torch"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference of a trial, relative to the stock result's norm: a few roundings. A wrong formula gives > 0.1."""
_TRIAL_ROWS = 48
_NARROW, _MANY_ROWS = 256, 2**15 + 5
_SILU = ("SiLUActivation", "SiLU")
_StandIn = tuple[Any, tuple[torch.Tensor, ...], dict[str, Any]]
"""In place of a module, which has linear layers and perhaps partitioned weights, in a trial; and its inputs."""


def use_liger(model: PreTrainedModel, kernels: Kernels, device: torch.device) -> None:
    """Replace what liger-kernel has a kernel for, and say in one line of the log what that was.

    Args:
        model: whole or partitioned by ZeRO-3, with an adapter or without, inside an `Embedder` already: its pooling
            norm and last layer are not stock and stay as they are.
        kernels: "auto": on a GPU in half precision where liger-kernel is installed; "liger": or an error; "torch": no.
        device: where the model will run.
    Raises:
        UserError: "liger" without liger-kernel or GPU; a kernel that does not compute what the stock module does.
    """
    dtype = next(model.parameters()).dtype
    if not _wanted(kernels, device, dtype):
        return
    taken: Counter[str] = Counter()
    left: Counter[str] = Counter()
    tried = set()
    for name, module in model.named_modules():
        kind = _KINDS.get(type(module))
        if kind is None or _is_in_last_layer(model, name, kind):
            continue
        if kind is _MLP and type(module.act_fn).__name__ not in _SILU:
            left[type(module).__name__] += 1
            continue
        case = (type(module), kind.size(module))
        if case not in tried:
            tried.add(case)
            _try(kind, module, device, dtype)
        taken[f"{type(module).__name__} ({kind.name})"] += 1
        module.__class__ = _FUSED[type(module)]
    told = ", ".join(f"{count} {name}" for name, count in taken.items())
    kept = "".join(f"; stock because of another activation: {count} {name}" for name, count in left.items())
    log.info("liger-kernel %s: %s%s", importlib.metadata.version("liger-kernel"), told, kept)


def _wanted(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> bool:
    installed = importlib.util.find_spec("liger_kernel") is not None
    if kernels == "liger":
        if not installed:
            raise UserError("model.kernels=liger but liger-kernel is not installed: install it or set it to auto")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError("model.kernels=liger needs a GPU, this machine has none: set it to auto")
        return True
    return kernels == "auto" and installed and device.type == "cuda" and dtype != torch.float32


def _is_in_last_layer(model: Any, name: str, kind: _Kind) -> bool:
    """Attention whose parts a `LastLayer` uses without calling it."""
    holder = model.get_submodule(name.rpartition(".")[0])
    return kind.name == "rotary" and isinstance(holder, LastLayer)


# ---- the forwards


def _rms_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "llama" rounds before the weight, as the stock norms do. Not in place: the gradient may be needed elsewhere.
    offset, casting, in_place = 0.0, "llama", False
    return LigerRMSNormFunction.apply(
        hidden_states, self.weight, self.variance_epsilon, offset, casting, in_place, None
    )


def _swiglu(self: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


def _rotate(
    q_1HTd: torch.Tensor, k_1GTd: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel reads the left half of each table alone, works in their type, and writes over its inputs."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(q_1HTd, k_1GTd, *tables)


def _text_attention(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of all three families, for packs: nothing is cached, nothing dropped out."""
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (project(hidden_states).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = _rotate(q.transpose(1, 2), k.transpose(1, 2), position_embeddings)
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attend(self, q, k, v.transpose(1, 2), attention_mask, scaling=self.scaling, **kwargs)
    return self.o_proj(out.flatten(2)), weights


# ---- their trials


class _Draw:
    """Random tensors in their order, the same for every pass of a trial; `leaves` are those that get a gradient."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self.device, self._dtype = device, dtype
        self.leaves: list[torch.Tensor] = []

    def leaf(self, *shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator).to(self.device, self._dtype)
        self.leaves.append(values.requires_grad_())
        return values

    def tables(self, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of any angles, [rows, dim], the right half like the left."""
        angles = torch.rand(_TRIAL_ROWS, dim // 2, generator=self._generator).mul_(6).repeat(1, 2).to(self.device)
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)

    def plan(self) -> Any:
        return separate([_TRIAL_ROWS - 7, 7]).map(lambda tensor: tensor.to(self.device))


def _norm_stand_in(draw: _Draw, norm: Any) -> _StandIn:
    (width,) = _norm_size(norm)
    stand_in = SimpleNamespace(weight=draw.leaf(width), variance_epsilon=norm.variance_epsilon)
    # A norm of heads has many rows: liger-kernel has another kernel for them.
    rows = _MANY_ROWS if width <= _NARROW and draw.device.type == "cuda" else _TRIAL_ROWS
    return stand_in, (draw.leaf(rows, width),), {}


def _mlp_stand_in(draw: _Draw, mlp: Any) -> _StandIn:
    parts: dict[str, Callable] = {"gate_proj": lambda x: x * 1, "up_proj": lambda x: x.flip(-1), "down_proj": _same}
    return SimpleNamespace(act_fn=mlp.act_fn, **parts), (draw.leaf(_TRIAL_ROWS, mlp.intermediate_size),), {}


def _text_stand_in(draw: _Draw, attention: Any) -> _StandIn:
    heads, kv_heads, dim = _text_size(attention)
    ends = [dim * n for n in (0, heads, heads + kv_heads, heads + 2 * kv_heads)]
    cuts = [slice(*pair) for pair in pairwise(ends)]
    stand_in = SimpleNamespace(
        **{name: _Cut(cut) for name, cut in zip(("q_proj", "k_proj", "v_proj"), cuts, strict=True)},
        **(dict.fromkeys(("q_norm", "k_norm"), _same) if hasattr(attention, "q_norm") else {}),
        **{"o_proj": _same, "config": attention.config, "head_dim": dim, "scaling": dim**-0.5, "training": False},
        **{"attention_dropout": 0.0, "sliding_window": None, "layer_idx": 0},
    )
    given = {"attention_mask": None, "position_embeddings": tuple(table[None] for table in draw.tables(dim))}
    return stand_in, (draw.leaf(1, _TRIAL_ROWS, ends[-1]),), given | {"segments": draw.plan()}


class _Cut:
    """In place of a projection: some columns of the input."""

    def __init__(self, columns: slice) -> None:
        self._columns = columns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self._columns] * 1


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _try(kind: _Kind, module: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where ours differs from the stock forward."""
    passes = []
    for forward in (type(module).forward, kind.forward):
        draw = _Draw(device, dtype)
        stand_in, inputs, given = kind.stand_in(draw, module)
        with torch.enable_grad():
            out = forward(stand_in, *inputs, **given)
            out = out[0] if isinstance(out, tuple) else out
            upstream = _Draw(device, dtype).leaf(*out.shape).detach()
            passes.append([out.detach(), *torch.autograd.grad(out, draw.leaves, upstream)])
    worst = max(
        float((ours.float() - stock.float()).norm() / stock.float().norm()) for stock, ours in zip(*passes, strict=True)
    )
    if not worst <= TOLERANCE[dtype]:
        problem = f"liger-kernel's {kind.name} differs from {type(module).__name__} by {worst:.1e} in {dtype}"
        raise UserError(
            f"{problem} (limit {TOLERANCE[dtype]:.0e}): set model.kernels=torch, or install another version"
        )


class _Kind(NamedTuple):
    name: str
    forward: Callable[..., Any]
    size: Callable[[Any], tuple[int, ...]]
    stand_in: Callable[[_Draw, Any], _StandIn]


def _norm_size(norm: Any) -> tuple[int, ...]:
    weight = norm.weight
    return tuple(getattr(weight, "ds_shape", weight.shape))  # ZeRO-3 leaves a partitioned weight no shape of its own


def _mlp_size(mlp: Any) -> tuple[int, ...]:
    return (mlp.intermediate_size,)


def _text_size(attention: Any) -> tuple[int, ...]:
    return attention.config.num_attention_heads, attention.config.num_key_value_heads, attention.head_dim


_NORM = _Kind("RMSNorm", _rms_norm, _norm_size, _norm_stand_in)
_MLP = _Kind("SwiGLU", _swiglu, _mlp_size, _mlp_stand_in)
_TEXT = _Kind("rotary", _text_attention, _text_size, _text_stand_in)
_KINDS: dict[type, _Kind] = {
    **dict.fromkeys((qwen2_vl.Qwen2VLRMSNorm, qwen2_5_vl.Qwen2_5_VLRMSNorm, qwen3_vl.Qwen3VLTextRMSNorm), _NORM),
    **dict.fromkeys((qwen2_vl.Qwen2MLP, qwen2_5_vl.Qwen2MLP, qwen2_5_vl.Qwen2_5_VLMLP, qwen3_vl.Qwen3VLTextMLP), _MLP),
    **dict.fromkeys((qwen2_vl.Qwen2VLAttention, qwen2_5_vl.Qwen2_5_VLAttention, qwen3_vl.Qwen3VLTextAttention), _TEXT),
}
_FUSED = {stock: type(f"Liger{stock.__name__}", (stock,), {"forward": kind.forward}) for stock, kind in _KINDS.items()}
