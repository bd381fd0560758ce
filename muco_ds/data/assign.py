"""Which rank works on which examples, in which packs: fewest packs first, then the least cost on the slowest rank.

Every rank has the same number of packs, because every forward is a collective under ZeRO-3. The number of packs is
therefore what costs most, and among assignments with the fewest the cost (FLOPs) of the slowest rank is brought down:

1. examples are spread over ranks on cost, largest-first (Graham 1969) and by the largest differencing method
   (Karmarkar and Karp 1982), whichever leaves less on the slowest rank, and each rank splits its own evenly over its
   packs or, where that exceeds the budget, fills them first-fit-decreasing;
2. where some rank needs more packs that way than the tokens demand, packs are filled first and dealt to the ranks;
3. swaps and moves that keep every pack within its budget take cost off the slowest rank.

The fewest packs are those that step 2 finds; packing is NP-hard, and one more than the optimum is possible.

Costs are rounded to integers first: sums of floats depend on the machine's vector width, and all machines must agree.

Shape suffixes: B examples, R ranks, Q packs of all ranks, I examples of one rank, J what they may be swapped with.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from itertools import count

import numpy as np

GOOD_ENOUGH = 0.001  # above the lower bound, relative: better balance than this could not be measured in a run
_COST_UNITS = 2**40  # of the dearest example; int64 then holds the sum of millions of them
_SINGLES = 256  # up to here differencing starts from single examples, above it from blocks of one example a rank
_PARTNERS = 16  # lightest ranks that the heaviest one may swap with
_SWAPS_PER_RANK = 4


def assign(flops_B: np.ndarray, tokens_B: np.ndarray, ranks: int, pack_tokens: int) -> list[list[np.ndarray]]:
    """`packs[rank][pack]`: sorted int64 positions in the arrays; as many packs on every rank, spare ones empty, last.

    A function of its arguments alone, the same on every machine.

    Args:
        flops_B: cost of each example, finite and not negative.
        tokens_B: int, at most `pack_tokens` each.
    """
    assert ranks > 0 and len(flops_B) == len(tokens_B) > 0
    assert int(tokens_B.max()) <= pack_tokens, "an example exceeds a pack"
    dearest = float(flops_B.max())
    cost_B = (flops_B * (_COST_UNITS / dearest if dearest > 0 else 0.0)).astype(np.int64)
    tokens_B = tokens_B.astype(np.int64)
    by_cost = _spread(cost_B, ranks)
    n_packs = max(1, -(-int(tokens_B.sum()) // (ranks * pack_tokens)))
    while True:
        pack_B = _pack_each_rank(by_cost, cost_B, tokens_B, n_packs, pack_tokens)
        if pack_B is None:
            pack_B = _pack_first(cost_B, tokens_B, ranks, n_packs, pack_tokens)
        if pack_B is not None:
            break
        n_packs += 1
    room_Q = np.full(ranks * n_packs, pack_tokens)
    np.subtract.at(room_Q, pack_B, tokens_B)
    _level(pack_B, cost_B, ranks, n_packs, room_Q, _good_enough(cost_B, ranks), tokens_B)
    return _listed(pack_B, cost_B, ranks, n_packs)


def least_pack_tokens(tokens_B: np.ndarray, ranks: int, n_packs: int, enough: int) -> int:
    """Smallest budget, to within half a percent, at which these examples still take `n_packs` packs on every rank.

    Args:
        enough: a budget at which they do.
    """
    low = max(int(tokens_B.max()), -(-int(tokens_B.sum()) // (ranks * n_packs)))
    while enough > low * 1.005:
        middle = (low + enough) // 2
        if len(assign(tokens_B, tokens_B, ranks, middle)[0]) <= n_packs:
            enough = middle
        else:
            low = middle + 1
    return enough


def largest_first(weights_B: np.ndarray, parts: int) -> list[list[int]]:
    """Every example, heaviest first, to the lightest part; among equals to the one with the fewest examples."""
    members: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, 0, part) for part in range(parts)]
    for i in np.argsort(-weights_B, kind="stable").tolist():
        load, size, part = heap[0]
        members[part].append(i)
        heapq.heapreplace(heap, (load + int(weights_B[i]), size + 1, part))
    return members


def differencing(weights_B: np.ndarray, parts: int, block: int) -> list[list[int]]:
    """Largest differencing method for several parts.

    Partial solutions, at first of `block` examples in parts of their own, are merged two at a time, those with the
    largest spread of loads first, the heaviest part of one with the lightest of the other. With `block` = `parts` this
    is the balanced variant (Michiels et al. 2012): B / parts merges instead of B, and parts of equal size.
    """
    order = np.argsort(-weights_B, kind="stable").tolist()
    ticket = count()  # equal spreads: the older solution first, and lists are never compared
    heap = []
    for start in range(0, len(order), block):
        members = [[i] for i in order[start : start + block]]
        loads_P = np.zeros(parts, np.int64)
        loads_P[: len(members)] = weights_B[order[start : start + block]]
        members += [[] for _ in range(parts - len(members))]
        heap.append((-int(loads_P[0] - loads_P[-1]), next(ticket), loads_P, members))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, _, loads_P, members = heapq.heappop(heap)
        _, _, other_P, others = heapq.heappop(heap)
        loads_P = loads_P + other_P[::-1]
        order_P = np.argsort(-loads_P, kind="stable")
        loads_P = loads_P[order_P]
        members = [members[part] + others[-1 - part] for part in order_P.tolist()]
        heapq.heappush(heap, (-int(loads_P[0] - loads_P[-1]), next(ticket), loads_P, members))
    return heap[0][3]


def _spread(cost_B: np.ndarray, ranks: int) -> list[list[int]]:
    """Examples of each rank on cost alone."""
    first = largest_first(cost_B, ranks)
    most = _most(cost_B, first)
    if most <= _good_enough(cost_B, ranks):
        return first
    second = differencing(cost_B, ranks, 1 if len(cost_B) <= _SINGLES else ranks)
    return second if _most(cost_B, second) < most else first


def _good_enough(cost_B: np.ndarray, ranks: int) -> float:
    return (1 + GOOD_ENOUGH) * max(int(cost_B.max()), int(cost_B.sum()) / ranks)


def _most(weights_B: np.ndarray, parts: list[list[int]]) -> int:
    return max(int(weights_B[part].sum()) for part in parts)


def _pack_each_rank(
    spread: list[list[int]], cost_B: np.ndarray, tokens_B: np.ndarray, n_packs: int, pack_tokens: int
) -> np.ndarray | None:
    """Pack of each example, [B] int64 (rank * n_packs + pack); None where a rank needs more than `n_packs`."""
    pack_B = np.full(len(tokens_B), -1)
    for rank, members in enumerate(spread):
        packs = _split(members, cost_B, tokens_B, n_packs, pack_tokens)
        packs = packs or _first_fit(members, tokens_B, n_packs, pack_tokens)
        if packs is None:
            return None
        for pack, filled in enumerate(packs):
            pack_B[filled] = rank * n_packs + pack
    return pack_B


def _split(
    members: list[int], cost_B: np.ndarray, tokens_B: np.ndarray, n_packs: int, pack_tokens: int
) -> list[list[int]] | None:
    """Packs of about the same cost, where those stay within the budget.

    Packs of different ranks run at the same time and wait for each other in every layer under ZeRO-3, so packs that
    are all alike lose less than full ones and a remainder, and the largest of them needs less memory.
    """
    split = largest_first(cost_B[members], n_packs)
    packs = [[members[k] for k in pack] for pack in split]
    return packs if _most(tokens_B, packs) <= pack_tokens else None


def _first_fit(members: list[int], tokens_B: np.ndarray, n_packs: int, pack_tokens: int) -> list[list[int]] | None:
    """Each example, most tokens first, into the first pack with room."""
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    room = [pack_tokens] * n_packs
    for i in sorted(members, key=lambda i: (-tokens_B[i], i)):
        need = int(tokens_B[i])
        pack = next((pack for pack, left in enumerate(room) if need <= left), None)
        if pack is None:
            return None
        packs[pack].append(i)
        room[pack] -= need
    return packs


def _best_fit(tokens_B: np.ndarray, n_packs: int, pack_tokens: int) -> np.ndarray | None:
    """Pack of each example: most tokens first, where the least room is left. First fit would look at every pack."""
    pack_B = np.full(len(tokens_B), -1)
    rooms = [(pack_tokens, pack) for pack in range(n_packs)]
    for i in np.argsort(-tokens_B, kind="stable").tolist():
        need = int(tokens_B[i])
        at = bisect_left(rooms, (need, -1))
        if at == len(rooms):
            return None
        left, pack_B[i] = rooms.pop(at)
        insort(rooms, (left - need, int(pack_B[i])))
    return pack_B


def _pack_first(
    cost_B: np.ndarray, tokens_B: np.ndarray, ranks: int, n_packs: int, pack_tokens: int
) -> np.ndarray | None:
    """As `_pack_each_rank`: all examples into `ranks * n_packs` packs, and then each rank `n_packs` of those."""
    total = ranks * n_packs
    even_B = np.full(len(tokens_B), -1)
    for pack, members in enumerate(differencing(tokens_B, total, total)):
        even_B[members] = pack
    if _level(even_B, tokens_B, total, 1, np.full(total, int(tokens_B.sum())), goal=pack_tokens):
        filled_B = even_B
    elif (packed_B := _best_fit(tokens_B, total, pack_tokens)) is not None:
        filled_B = packed_B
    else:
        return None
    pack_cost_Q = np.zeros(total, np.int64)
    np.add.at(pack_cost_Q, filled_B, cost_B)
    place_Q = np.empty(total, np.int64)
    for rank, dealt in enumerate(differencing(pack_cost_Q, ranks, ranks)):
        place_Q[dealt] = np.arange(rank * n_packs, (rank + 1) * n_packs)
    return place_Q[filled_B]


def _level(
    pack_B: np.ndarray,
    weight_B: np.ndarray,
    ranks: int,
    n_packs: int,
    room_Q: np.ndarray,
    goal: float,
    tokens_B: np.ndarray | None = None,
) -> bool:
    """Swap and move examples of the heaviest rank (changes `pack_B`, `room_Q`) until it is down to the goal: True.

    False where nothing helps any more or the swaps that are allowed are used up.
    """
    tokens_B = weight_B if tokens_B is None else tokens_B
    load_R = np.zeros(ranks, np.int64)
    np.add.at(load_R, pack_B // n_packs, weight_B)
    for _ in range(_SWAPS_PER_RANK * ranks):
        heaviest = int(load_R.argmax())
        if load_R[heaviest] <= goal:
            return True
        partners_R = np.argsort(load_R, kind="stable")[:-1][:_PARTNERS]
        swap = _best_swap(heaviest, partners_R, pack_B, weight_B, tokens_B, load_R, room_Q, n_packs)
        if swap is None:
            return False
        mine, theirs, to = swap
        for i, pack in ((mine, to), (theirs, int(pack_B[mine]))):
            if i is not None:
                load_R[[pack_B[i] // n_packs, pack // n_packs]] += np.array([-1, 1]) * weight_B[i]
                room_Q[[pack_B[i], pack]] += np.array([1, -1]) * tokens_B[i]
                pack_B[i] = pack
    return bool(load_R.max() <= goal)


def _best_swap(
    heaviest: int,
    partners_R: np.ndarray,
    pack_B: np.ndarray,
    weight_B: np.ndarray,
    tokens_B: np.ndarray,
    load_R: np.ndarray,
    room_Q: np.ndarray,
    n_packs: int,
) -> tuple[int, int | None, int] | None:
    """(example of the heaviest rank, example to take for it or None, pack where it goes) with the lowest higher load of
    the two ranks, or None if every choice would leave one as high as it is."""
    is_partner_R = np.zeros(len(load_R), bool)
    is_partner_R[partners_R] = True
    rank_B = pack_B // n_packs
    mine_I, theirs_J = np.flatnonzero(rank_B == heaviest), np.flatnonzero(is_partner_R[rank_B])
    # Behind the partners' examples: nothing at all, once in each of their packs, which makes a swap a move.
    packs_J = np.concatenate([pack_B[theirs_J], np.flatnonzero(np.repeat(is_partner_R, n_packs))])
    pad = len(packs_J) - len(theirs_J)
    weight_J, tokens_J = (np.pad(values[theirs_J], (0, pad)) for values in (weight_B, tokens_B))
    less_IJ = weight_B[mine_I, None] - weight_J
    more_IJ = tokens_B[mine_I, None] - tokens_J
    higher_IJ = np.maximum(load_R[heaviest] - less_IJ, load_R[packs_J // n_packs] + less_IJ)
    fits_IJ = (more_IJ <= room_Q[packs_J]) & (-more_IJ <= room_Q[pack_B[mine_I], None])
    higher_IJ[~fits_IJ] = load_R[heaviest]
    best_i, best_j = divmod(int(higher_IJ.argmin()), len(packs_J))
    if higher_IJ[best_i, best_j] >= load_R[heaviest]:
        return None
    return int(mine_I[best_i]), int(theirs_J[best_j]) if best_j < len(theirs_J) else None, int(packs_J[best_j])


def _listed(pack_B: np.ndarray, cost_B: np.ndarray, ranks: int, n_packs: int) -> list[list[np.ndarray]]:
    """Packs of each rank, dearest first: those that run at the same time on all ranks are then alike."""
    order_B = np.argsort(pack_B, kind="stable")
    packs = np.split(order_B, np.cumsum(np.bincount(pack_B, minlength=ranks * n_packs))[:-1])
    listed = []
    for rank in range(ranks):
        own = packs[rank * n_packs : (rank + 1) * n_packs]
        listed.append(sorted(own, key=lambda pack: (-int(cost_B[pack].sum()), len(pack) == 0)))
    return listed
