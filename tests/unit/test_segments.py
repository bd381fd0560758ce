"""SegmentPlan: its dense mask against masks written by hand."""

from __future__ import annotations

import numpy as np
import torch

from muco_ds.data.segments import Segment, SegmentBuilder, SegmentPlan, causal, isolated, separate


def plan_of(*calls: tuple[int, list[int] | None]) -> SegmentPlan:
    """Dialogues in order: (length, None) is causal, (prefix, turns) isolated."""
    builder = SegmentBuilder()
    for length, turns in calls:
        if turns is None:
            builder.add(causal(length))
        else:
            builder.add(isolated(length, turns))
    return builder.build()


def mask_of(picture: str) -> torch.Tensor:
    return torch.tensor([[cell == "x" for cell in line.strip()] for line in picture.strip().splitlines()])


def test_causal_dialogues() -> None:
    plan = plan_of((3, None), (1, None), (2, None))
    assert torch.equal(
        plan.dense_mask(),
        mask_of("""
            x.....
            xx....
            xxx...
            ...x..
            ....x.
            ....xx
        """),
    )
    assert plan.kv_index_J is None and (plan.max_q, plan.max_k) == (3, 3)
    assert plan.cu_q_S1.tolist() == plan.cu_k_S1.tolist() == [0, 3, 4, 6]


def test_isolated_turns_see_the_prefix_and_themselves() -> None:
    plan = plan_of((2, [1, 3]))
    assert torch.equal(
        plan.dense_mask(),
        mask_of("""
            x.....
            xx....
            xxx...
            xx.x..
            xx.xx.
            xx.xxx
        """),
    )
    assert plan.kv_index_J is not None and plan.kv_index_J.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5]
    assert plan.cu_q_S1.tolist() == [0, 2, 3, 6] and plan.cu_k_S1.tolist() == [0, 2, 5, 10]
    assert (plan.max_q, plan.max_k) == (3, 5)
    assert plan.cu_q_S1.dtype == plan.cu_k_S1.dtype == torch.int32


def test_mixed_dialogues() -> None:
    plan = plan_of((2, None), (1, [2, 1]), (1, None), (2, [1]))
    assert torch.equal(
        plan.dense_mask(),
        mask_of("""
            x.........
            xx........
            ..x.......
            ..xx......
            ..xxx.....
            ..x..x....
            ......x...
            .......x..
            .......xx.
            .......xxx
        """),
    )


def test_a_single_isolated_turn_is_a_causal_dialogue() -> None:
    assert torch.equal(plan_of((4, [3])).dense_mask(), plan_of((7, None)).dense_mask())


def test_map_forgets_what_a_backend_cached_for_the_old_tensors() -> None:
    plan = plan_of((2, [1, 3]))
    plan.cache["sdpa"] = object()
    moved = plan.map(lambda tensor: tensor.clone())
    assert moved.cache == {} and "sdpa" in plan.cache
    assert torch.equal(moved.dense_mask(), plan.dense_mask()) and moved.max_k == plan.max_k


def test_a_conversation_sees_its_context_and_itself() -> None:
    builder = SegmentBuilder()
    builder.add(causal(1))
    builder.add([*causal(4), Segment(3, context=(2, 4))])
    builder.add([*causal(1), Segment(2)])
    plan = builder.build()
    assert torch.equal(
        plan.dense_mask(),
        mask_of("""
            x..........
            .x.........
            .xx........
            .xxx.......
            .xxxx......
            ...xxx.....
            ...xxxx....
            ...xxxxx...
            ........x..
            .........x.
            .........xx
        """),
    )
    assert plan.kv_index_J is not None and plan.kv_index_J.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9, 10]


def test_turns_without_a_prefix_stand_alone() -> None:
    assert isolated(0, [2, 3]) == [Segment(2), Segment(3)]


def test_chosen_rows_see_what_they_see_in_the_whole_plan() -> None:
    """Any rows in any order, runs of them, of causal dialogues and isolated turns."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        calls = [
            (
                int(rng.integers(1, 9)),
                None if rng.random() < 0.5 else rng.integers(1, 6, int(rng.integers(1, 4))).tolist(),
            )
            for _ in range(5)
        ]
        plan = plan_of(*calls)
        total = int(plan.cu_q_S1[-1])
        first = int(rng.integers(0, total))
        rows = np.concatenate([rng.permutation(total)[: int(rng.integers(1, total))], np.arange(first, total)])
        chosen = plan.of_rows(rows)
        assert torch.equal(chosen.dense_mask(total), plan.dense_mask()[rows])
        assert chosen.max_q == int(chosen.cu_q_S1.diff().max()) and chosen.max_k == int(chosen.cu_k_S1.diff().max())
        assert len(chosen.kv_index_J) == int(chosen.cu_k_S1[-1])
        assert chosen.cu_q_S1.dtype == chosen.cu_k_S1.dtype == torch.int32


def test_consecutive_rows_share_their_keys() -> None:
    """32 compression tokens are one segment, not 32 copies of all that stands before them."""
    chosen = plan_of((40, None), (20, None)).of_rows(np.array([*range(8, 40), 59]))
    assert chosen.cu_q_S1.tolist() == [0, 32, 33] and chosen.cu_k_S1.tolist() == [0, 40, 60]


def test_separate_stretches_see_all_of_themselves() -> None:
    plan = separate([2, 1, 3])
    assert torch.equal(
        plan.dense_mask(),
        mask_of("""
            xx....
            xx....
            ..x...
            ...xxx
            ...xxx
            ...xxx
        """),
    )
    assert plan.kv_index_J is None and (plan.max_q, plan.max_k) == (3, 3) and not plan.causal
