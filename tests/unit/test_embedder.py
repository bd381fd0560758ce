"""The promises of the Embedder: packed = alone, no leak, the same gradients by every way, one vision call.

Shape suffixes: E pooled rows, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from muco_ds.config_activations import ActivationCheckpointing
from muco_ds.data.schema import Dialogue, PackedBatch
from muco_ds.models.attention import segment_attention
from muco_ds.models.embedder import DeviceRoom, Embedder, KeptVision
from muco_ds.models.recompute import recompute_layers

from tiny_folders import KINDS
from tiny_models import POOL_TOKENS, embedder, new_embedder, pack, packer, picture, stock_dialogue, stock_model

ONE = Dialogue(("What is in the top left corner?",), (picture(1),))
TEXT = Dialogue(("the colours are red and blue",))
TURNS = ("Describe the picture.", "a", "Which colours are the shapes, and where is the sign?")
MULTI = Dialogue(TURNS, (picture(2, 140, 84),))
MULTI_TEXT = Dialogue(("the tale of the red star", "b", "a forest scene"))

# name: dialogues and which of them see their earlier turns.
PACKS: dict[str, tuple[list[Dialogue], list[bool]]] = {
    "picture_first": ([ONE, TEXT, MULTI_TEXT], [False, False, False]),
    "picture_last": ([TEXT, MULTI_TEXT, ONE], [False, True, False]),
    "picture_absent": ([TEXT, Dialogue(("a",)), MULTI_TEXT], [False, True, False]),
    "one_token_texts": ([Dialogue(("a",)), Dialogue(("b",), (picture(3),)), Dialogue(("c",))], [False, True, False]),
    "picture_without_text": (
        [Dialogue(("",), (picture(4),)), TEXT, Dialogue(("",), (picture(5),))],
        [True, False, False],
    ),
    "several_pictures": (
        [Dialogue(("Compare them.", "a"), (picture(6, 56, 140), picture(7), picture(8, 168, 56))), TEXT, ONE],
        [True, False, False],
    ),
    "sizes": (
        [replace(ONE, images=(picture(9, *size),)) for size in ((30, 45), (600, 90), (85, 113))],
        [False, False, True],
    ),
    "isolated_turns": ([MULTI, TEXT, replace(MULTI, images=(picture(12), picture(13)))], [False, False, False]),
    "causal_turns": ([MULTI, MULTI_TEXT, TEXT, replace(MULTI, images=(picture(14), picture(15)))], [True] * 4),
    "mixed": ([MULTI, MULTI, MULTI_TEXT, ONE, MULTI_TEXT], [True, False, False, True, True]),
}


@pytest.mark.parametrize("case", PACKS)
@pytest.mark.parametrize("pool", POOL_TOKENS)
@pytest.mark.parametrize("attention", ["sdpa", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone_in_the_stock_model(kind: str, attention: str, pool: str, case: str) -> None:
    dialogues, histories = PACKS[case]
    with torch.no_grad():
        packed_ED = embedder(kind, attention)(pack(dialogues, histories, kind, pool))
    alone_ED = torch.stack(
        [
            emb_D
            for dialogue, history in zip(dialogues, histories, strict=True)
            for emb_D in stock_dialogue(kind, pool, dialogue, history)
        ]
    )
    assert packed_ED.dtype == torch.float32
    torch.testing.assert_close(packed_ED, alone_ED, atol=1e-5, rtol=0)


def test_the_tiny_models_tell_prompts_apart() -> None:
    """Without this, the tolerance of packed = alone would prove nothing."""
    others = [ONE, replace(ONE, images=(picture(16),)), replace(ONE, turns=("What is in the top right corner?",)), TEXT]
    with torch.no_grad():
        for kind in KINDS:
            emb_ED = embedder(kind)(pack(others, False, kind))
            assert (emb_ED[1:] - emb_ED[0]).abs().amax(1).min() > 1e-3


def embeddings(dialogues: list[Dialogue], history: bool, kind: str = "qwen2_vl") -> torch.Tensor:
    with torch.no_grad():
        return embedder(kind)(pack(dialogues, history, kind))


def row_range(dialogues: list[Dialogue], at: int) -> slice:
    start = sum(len(dialogue.turns) for dialogue in dialogues[:at])
    return slice(start, start + len(dialogues[at].turns))


def same_length(text: str, other: str) -> None:
    first, second = packer().template.encode_texts([text, other])
    assert first != second and len(first) == len(second)


CHANGES: dict[str, Callable[[Dialogue], Dialogue]] = {
    "text": lambda dialogue: replace(dialogue, turns=("Describe the picture?", *dialogue.turns[1:])),
    "picture": lambda dialogue: replace(dialogue, images=(picture(99, 140, 84),)),
}


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_no_leak_into_other_dialogues(kind: str, at: int, change: str, history: bool) -> None:
    same_length("Describe the picture.", "Describe the picture?")
    dialogues = [MULTI_TEXT, ONE]
    dialogues.insert(at, MULTI)
    changed = [*dialogues[:at], CHANGES[change](MULTI), *dialogues[at + 1 :]]
    before_ED, after_ED = embeddings(dialogues, history, kind), embeddings(changed, history, kind)
    own = row_range(dialogues, at)
    others_E = torch.ones(len(before_ED), dtype=torch.bool)
    others_E[own] = False
    assert torch.equal(before_ED[others_E], after_ED[others_E])
    assert not torch.equal(before_ED[own.start], after_ED[own.start])
    if change == "picture":
        assert (before_ED[own] != after_ED[own]).any(1).all()  # every turn sees it


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_no_leak_between_isolated_turns(turn: int) -> None:
    changed = replace(MULTI, turns=tuple("b" if j == turn == 1 else swapped(t, j == turn) for j, t in enumerate(TURNS)))
    before_ED, after_ED = embeddings([TEXT, MULTI], False), embeddings([TEXT, changed], False)
    differs_E = (before_ED != after_ED).any(1).tolist()
    assert differs_E == [False, *(j == turn for j in range(3))]


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_no_leak_backwards_between_causal_turns_and_history_forwards(turn: int) -> None:
    changed = replace(MULTI, turns=tuple("b" if j == turn == 1 else swapped(t, j == turn) for j, t in enumerate(TURNS)))
    before_ED, after_ED = embeddings([TEXT, MULTI], True), embeddings([TEXT, changed], True)
    differs_E = (before_ED != after_ED).any(1).tolist()
    assert differs_E == [False, *(j >= turn for j in range(3))]


def swapped(text: str, change: bool) -> str:
    """The text with another last character, the same number of tokens."""
    if not change or len(text) == 1:
        return text
    other = text[:-1] + ("?" if text[-1] == "." else ".")
    same_length(text, other)
    return other


@pytest.mark.parametrize("history", [False, True])
def test_no_leak_of_nan_from_a_padded_neighbour(history: bool) -> None:
    """Padding of grouped segments must repeat the segment's own rows: a masked NaN is still a NaN in a softmax."""
    plan = pack([TEXT, MULTI_TEXT, ONE], history).segments
    first = int(plan.cu_q_S1[1 if history else 2])  # rows of the first dialogue
    q, k, v = (torch.randn(int(plan.cu_q_S1[-1]), heads, 8) for heads in (4, 2, 2))
    k[first:], v[first:] = float("nan"), float("nan")
    out = segment_attention(q, k, v, plan, 8**-0.5, "sdpa")
    assert out[:first].isfinite().all() and out[first:].isnan().all()


# ---- gradients


def gradients(model: Embedder, batch: PackedBatch, kept: KeptVision | None = None) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    emb_ED = model(batch, kept)
    (emb_ED * upstream(emb_ED)).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def upstream(emb_ED: torch.Tensor) -> torch.Tensor:
    return torch.randn(emb_ED.shape, generator=torch.Generator().manual_seed(3)).to(emb_ED.dtype)


def assert_same(got: dict[str, torch.Tensor | None], want: dict[str, torch.Tensor | None], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        grad = got[name]
        assert grad is not None and expected is not None, name
        # A gradient that is zero in exact arithmetic (a key's bias cancels in the softmax) has no scale of its own.
        scale = max(float(expected.norm()), 1e-6)
        assert float((grad - expected).norm()) <= tolerance * scale, name


def mixed_pack(kind: str = "qwen2_vl") -> PackedBatch:
    dialogues, histories = PACKS["mixed"]
    several = PACKS["several_pictures"][0][0]
    return pack([*dialogues, several], [*histories, False], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_sdpa_equal_those_of_the_dense_twin(kind: str) -> None:
    batch = mixed_pack(kind)
    twins = (new_embedder(kind, attention=name, dtype=torch.float64) for name in ("sdpa", "dense"))
    got, want = (gradients(model, batch) for model in twins)
    assert sum(float(grad.norm()) > 1e-3 for grad in want.values() if grad is not None) > len(want) // 2
    assert_same(got, want, 2e-6)  # not 1e-12: the stock RMSNorm and rotary tables compute in float32


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_sum_of_those_of_the_stock_model_on_each_turn_alone(kind: str) -> None:
    """Pictures on either side of ragged dialogues, causal and isolated turns, in float64; the tower included."""
    dialogues, histories = PACKS["mixed"]
    dialogues, histories = [*dialogues, PACKS["several_pictures"][0][0], TEXT], [*histories, False, True]
    got = gradients(new_embedder(kind, dtype=torch.float64), pack(dialogues, histories, kind))
    stock = stock_model(kind, torch.float64)
    alone_ED = torch.stack(
        [
            emb_D
            for dialogue, history in zip(dialogues, histories, strict=True)
            for emb_D in stock_dialogue(kind, "<|emb|>", dialogue, history, stock)
        ]
    )
    (alone_ED * upstream(alone_ED)).sum().backward()
    want = {f"model.{name}": parameter.grad for name, parameter in stock.named_parameters()}
    assert sum(float(grad.norm()) > 1e-3 for grad in want.values() if grad is not None) > len(want) // 2
    assert_same(got, want, 1e-5)  # norms and rotary tables compute in float32, ours pools in float64


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient(kind: str) -> None:
    """Of text layers the first ones are recomputed and never the last, of vision layers the first ones."""
    model = new_embedder(kind).train()
    batch = mixed_pack(kind)
    want = gradients(model, batch)
    text, vision = model.model.language_model.layers, model.model.visual.blocks
    calls: list[torch.nn.Module] = []
    for layer in (*text, *vision):
        layer.mlp.register_forward_pre_hook(lambda mlp, _: calls.append(mlp))
    for options, n_text, n_vision in (
        (ActivationCheckpointing(), len(text) - 1, len(vision)),
        (ActivationCheckpointing(0.01), 1, 1),
        (ActivationCheckpointing(0.0, 0.5), 0, -(-len(vision) // 2)),
        (ActivationCheckpointing(0.0), 0, 0),
    ):
        recompute_layers(model.model, options, freeze_vision=False)
        calls.clear()
        got = gradients(model, batch)
        twice = [*[i < n_text for i in range(len(text))], *[i < n_vision for i in range(len(vision))]]
        assert [calls.count(layer.mlp) == 2 for layer in (*text, *vision)] == twice, options
        assert_same(got, want, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_vision_gets_no_gradient_and_changes_no_other(kind: str) -> None:
    batch = mixed_pack(kind)
    free = gradients(new_embedder(kind), batch)
    model = new_embedder(kind, freeze_vision=True)
    assert not any(parameter.requires_grad for parameter in model.model.visual.parameters())
    frozen = gradients(model, batch)
    tower = {name for name in free if ".visual." in name}
    assert tower and all(frozen[name] is None and free[name] is not None for name in tower)
    text = free.keys() - tower
    assert_same({n: frozen[n] for n in text}, {n: free[n] for n in text}, 1e-6)


@pytest.mark.parametrize("freeze_vision", [False, True])
@pytest.mark.parametrize("dialogues", [[TEXT, MULTI_TEXT], [ONE, *PACKS["several_pictures"][0]]])
@pytest.mark.parametrize("kind", KINDS)
def test_vision_tower_runs_once_whatever_the_pack_holds(
    kind: str, dialogues: list[Dialogue], freeze_vision: bool
) -> None:
    model = new_embedder(kind, freeze_vision=freeze_vision)
    calls = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    model(pack(dialogues, False, kind))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_pack_without_pictures_gives_the_tower_zero_gradients_and_no_influence(
    kind: str,
) -> None:
    model = new_embedder(kind)
    batch = pack([TEXT, MULTI_TEXT], False, kind)
    assert not batch.has_images
    got = gradients(model, batch)
    for name, grad in got.items():
        assert grad is not None, f"{name}: None would leave this rank out of a gradient reduction"
        assert (".visual." in name) == (not grad.any()), name
    emb_ED = model(batch)
    assert torch.equal(emb_ED, model(replace(batch, palette_CV=torch.full_like(batch.palette_CV, float("nan")))))


@pytest.mark.parametrize(("frozen", "room"), [(True, 2**20), (True, 0), (False, 2**20)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_tower_runs_once_for_both_passes(kind: str, frozen: bool, room: int) -> None:
    model = new_embedder(kind)
    model.freeze_vision = frozen
    batch = pack([ONE, TEXT, *PACKS["several_pictures"][0]], False, kind)
    without = gradients(model, batch)
    calls: list[int] = []
    model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    kept = KeptVision(DeviceRoom(room))
    with torch.no_grad():
        first_ED = model(batch, kept)
    assert kept.filled == frozen
    second = gradients(model, batch, kept)
    assert torch.equal(first_ED, model(batch, kept))
    assert len(calls) == (1 if frozen else 3)
    text = {name for name in without if ".visual." not in name}
    assert_same({n: second[n] for n in text}, {n: without[n] for n in text}, 1e-6)


def test_vision_features_stay_on_the_device_while_there_is_room() -> None:
    """Three packs of 80 and 40 bytes in room for 170: what does not fit is moved away, and comes back the same."""
    room, cpu = DeviceRoom(170), torch.device("cpu")
    features = [(torch.full((4, 5), float(i)), torch.full((2, 5), float(-i))) for i in range(3)]
    kept = [KeptVision(room) for _ in features]
    for one, put in zip(kept, features, strict=True):
        assert one.get(cpu) is None
        one.put(put)
    back = [tensor for one in kept for tensor in one.get(cpu) or ()]
    put = tuple(tensor for pair in features for tensor in pair)
    assert [a is b for a, b in zip(back, put, strict=True)] == [True, True, False, True, False, False]
    assert all(torch.equal(a, b) for a, b in zip(back, put, strict=True))


def test_pooling_outside_a_forward_of_the_embedder_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="reading"):
        embedder().model.language_model.norm(torch.zeros(1, 2, 96))
