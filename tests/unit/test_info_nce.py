"""losses.info_nce: the tiled form equals the dense one and the paper's equation, and never holds rows x keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muco_ds.losses import InfoNCE, RowIds, false_negative_limit, info_nce, info_nce_dense
from muco_ds.losses.ids import Masks, SameTarget, label_ids

from largest_tensor import LargestTensor

Loss = Callable[..., InfoNCE]
MODES = ("mask", "positive", "keep")
BOTH = pytest.mark.parametrize("loss", [info_nce, info_nce_dense])


def make_batch(
    n_rows: int, n_keys: int, dim: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, RowIds, RowIds]:
    """Rows with their positives at random places among the keys, the rest negatives.

    There are few images and few texts, so that both masks bite.
    """
    generator = torch.Generator().manual_seed(seed)
    query_RD = F.normalize(torch.randn(n_rows, dim, generator=generator, dtype=dtype), dim=-1).requires_grad_()
    key_KD = F.normalize(torch.randn(n_keys, dim, generator=generator, dtype=dtype), dim=-1).requires_grad_()
    place_R = torch.randperm(n_keys, generator=generator)[:n_rows]
    key_ids_K3 = torch.stack(
        [
            torch.randint(0, 5, (n_keys,), generator=generator),
            torch.full((n_keys,), -1),
            torch.randint(0, 7, (n_keys,), generator=generator),
        ],
        dim=1,
    )
    key_ids_K3[place_R, 1] = torch.arange(n_rows)
    return query_RD, key_KD, RowIds.from_table(key_ids_K3[place_R]), RowIds.from_table(key_ids_K3)


def make_full_batch(
    n_rows: int, n_keys: int, margin: float, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, RowIds, RowIds, torch.Tensor]:
    """``make_batch`` with rows that lean towards their own positives, pair ids on several keys, and ``limit_R``."""
    query_RD, key_KD, query_ids, key_ids = make_batch(n_rows, n_keys, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    own_R = (query_ids.pair_id_N[:, None] == key_ids.pair_id_N).int().argmax(1)
    query_RD = F.normalize(query_RD.detach() + 0.3 * key_KD.detach()[own_R], dim=-1).requires_grad_()
    free_M = (key_ids.pair_id_N == -1).nonzero()[:, 0][: n_rows // 2]
    key_ids.pair_id_N[free_M] = torch.randint(0, n_rows, (len(free_M),), generator=generator)
    return query_RD, key_KD, query_ids, key_ids, false_negative_limit(query_RD, key_KD[own_R], margin)


def ids(*rows: tuple[int, int, int]) -> RowIds:
    return RowIds.from_table(torch.tensor(rows, dtype=torch.int64).reshape(-1, 3))


def gradients(loss: Loss, *batch: Any, **options: Any) -> list[torch.Tensor]:
    query_RD, key_KD = batch[:2]
    temperature = torch.tensor(0.05, dtype=query_RD.dtype, requires_grad=True)
    result = loss(*batch, temperature=temperature, **options)
    return [result.loss_sum, *torch.autograd.grad(result.loss_sum, [query_RD, key_KD, temperature])]


@pytest.mark.parametrize("tile_rows, tile_keys", [(1, 1), (3, 4), (7, 5), (1000, 1000)])
@pytest.mark.parametrize("n_rows, n_keys", [(1, 1), (5, 13), (13, 13), (7, 31)])
@pytest.mark.parametrize("same_image", [True, False])
@pytest.mark.parametrize("same_target", MODES)
@pytest.mark.parametrize("margin", [None, 0.1])
def test_tiled_equals_dense_forward_and_gradients(
    n_rows: int, n_keys: int, tile_rows: int, tile_keys: int, same_image: bool, same_target: str, margin: float | None
) -> None:
    *batch, limit_R = make_full_batch(n_rows, n_keys, margin or 0.0)
    options = {
        "mask_same_image": same_image,
        "same_target": same_target,
        "limit_R": None if margin is None else limit_R,
    }
    tiled = gradients(info_nce, *batch, tile_rows=tile_rows, tile_keys=tile_keys, **options)
    dense = gradients(info_nce_dense, *batch, **options)
    for got, want in zip(tiled, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_float32_for_every_input_dtype_and_under_autocast(dtype: torch.dtype) -> None:
    query_RD, key_KD, query_ids, key_ids = make_batch(9, 20, dtype=torch.float32)
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in (query_RD, key_KD)]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    with torch.autocast("cpu", torch.bfloat16):
        result = info_nce(low[0], low[1], query_ids, key_ids, tile_rows=4, tile_keys=6)
    reference = info_nce_dense(exact[0], exact[1], query_ids, key_ids)
    assert result.loss_sum.dtype == torch.float32
    torch.testing.assert_close(result.loss_sum.double(), reference.loss_sum, rtol=2e-6, atol=0)
    result.loss_sum.backward()
    reference.loss_sum.backward()
    for got, want in zip(low, exact, strict=True):
        assert got.grad is not None and want.grad is not None and got.grad.dtype == dtype
        error = (got.grad.double() - want.grad).norm() / want.grad.norm()
        assert error < max(1e-5, torch.finfo(dtype).eps)  # half precision: the rounding of the returned gradient alone


def test_gradcheck_in_float64() -> None:
    query_RD, key_KD, *tables = make_batch(5, 9, dim=4)

    def loss_sum(query_RD: torch.Tensor, key_KD: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        return info_nce(query_RD, key_KD, *tables, temperature=temperature, tile_rows=2, tile_keys=4).loss_sum

    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss_sum, (query_RD, key_KD, temperature))


@BOTH
def test_hand_computed_example(loss: Loss) -> None:
    # Two turns of image 0, one of image 1 that has the target text (hash 20) of pair 0, and a hard negative.
    # Temperature 1/2.
    query_RD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    key_KD = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    query_ids = ids((0, 5, 20), (0, 6, 21))
    key_ids = ids((0, 5, 20), (0, 6, 21), (1, 7, 20), (9, -1, 30))

    def value(**options: Any) -> float:
        return loss(query_RD, key_KD, query_ids, key_ids, temperature=0.5, **options).loss_sum.item()

    # s = q . k / tau: row 0 has (1.2, 0, 2, -2), row 1 (1.6, 2, 0, 0).
    e = math.exp
    row1_masked = math.log((e(2) + 2) / e(2))
    row1_open = math.log((e(1.6) + e(2) + 2) / e(2))
    assert value() == pytest.approx(math.log((e(1.2) + e(-2)) / e(1.2)) + row1_masked, rel=1e-6)
    assert value(mask_same_image=False) == pytest.approx(math.log((e(1.2) + 1 + e(-2)) / e(1.2)) + row1_open, rel=1e-6)
    row0_open = math.log((e(1.2) + e(2) + e(-2)) / e(1.2))
    assert value(same_target="keep") == pytest.approx(row0_open + row1_masked, rel=1e-6)
    # Both keys with text 20 are positives of row 0: their mean logit is 1.6.
    both = math.log(e(1.2) + e(2) + e(-2)) - 1.6
    assert value(same_target="positive") == pytest.approx(both + row1_masked, rel=1e-6)
    # Row 0's positive has cosine 0.6, the key of image 1 is nearer by 0.4; row 1's has 1, nothing is nearer.
    limit_R = torch.tensor([0.6, 1.0])
    alone = math.log((e(1.2) + e(-2)) / e(1.2))
    assert value(same_target="keep", limit_R=limit_R + 0.39) == pytest.approx(alone + row1_masked, rel=1e-6)
    assert value(same_target="keep", limit_R=limit_R + 0.41) == pytest.approx(row0_open + row1_masked, rel=1e-6)


@BOTH
def test_hard_negatives_as_extra_keys(loss: Loss) -> None:
    query_RD, key_KD, query_ids, key_ids = make_batch(4, 4)
    negative_ND = F.normalize(query_RD.detach() + 0.1, dim=-1).requires_grad_()
    fresh_ids = ids(*[(100 + i, -1, 100 + i) for i in range(4)])
    pairs = [getattr(key_ids, name) for name in vars(key_ids)], [getattr(fresh_ids, name) for name in vars(fresh_ids)]
    with_negatives_ids = RowIds(*[torch.cat(columns) for columns in zip(*pairs, strict=True)])

    plain = loss(query_RD, key_KD, query_ids, key_ids)
    harder = loss(query_RD, torch.cat([key_KD, negative_ND]), query_ids, with_negatives_ids)
    assert harder.loss_sum > plain.loss_sum + 1
    (grad_ND,) = torch.autograd.grad(harder.loss_sum, negative_ND)
    assert (grad_ND * query_RD).sum() > 0  # descent moves negatives away from the rows


def test_symmetric_direction_is_the_transposed_matrix() -> None:
    query_RD, key_RD, query_ids, key_ids = make_batch(6, 6)
    swapped = info_nce(key_RD, query_RD, key_ids, query_ids, temperature=0.1, tile_rows=4, tile_keys=4)
    logits_RK = (query_RD @ key_RD.T / 0.1).T
    positive_RK = key_ids.pair_id_N[:, None] == query_ids.pair_id_N
    excluded_RK = (key_ids.image_id_N[:, None] == query_ids.image_id_N) | (
        key_ids.target_hash_N[:, None] == query_ids.target_hash_N
    )
    logits_RK = logits_RK.masked_fill(excluded_RK & ~positive_RK, -math.inf)
    torch.testing.assert_close(
        swapped.loss_sum, F.cross_entropy(logits_RK, positive_RK.int().argmax(1), reduction="sum")
    )


@BOTH
def test_large_logits_stay_finite(loss: Loss) -> None:
    query_RD, key_KD, *tables = make_batch(16, 40, dtype=torch.float32)
    result = loss(query_RD, key_KD, *tables, temperature=0.001)
    grads = torch.autograd.grad(result.loss_sum, [query_RD, key_KD])
    assert result.loss_sum.isfinite() and result.loss_sum > 1000
    assert all(grad.isfinite().all() for grad in grads)


@BOTH
@pytest.mark.parametrize("same_target", MODES)
def test_row_without_a_positive_is_never_silent(loss: Loss, same_target: SameTarget) -> None:
    query_RD = torch.randn(2, 4, requires_grad=True)
    key_KD = torch.randn(3, 4)
    key_ids = ids((0, 1, 5), (1, 2, 1), (2, 9, 2))
    result = loss(query_RD, key_KD, ids((0, 0, 0), (2, 9, 2)), key_ids, same_target=same_target)
    assert result.loss_sum == math.inf
    if loss is info_nce:
        result.loss_sum.backward()
        assert query_RD.grad is not None and query_RD.grad[0].isnan().all() and query_RD.grad[1].isfinite().all()


@BOTH
@pytest.mark.parametrize("n_keys", [0, 5])
def test_no_rows_give_zero_with_a_graph(loss: Loss, n_keys: int) -> None:
    query_RD = torch.zeros(0, 4, requires_grad=True)
    key_KD = torch.randn(n_keys, 4, requires_grad=True)
    result = loss(query_RD, key_KD, ids(), ids(*[(i, i, i) for i in range(n_keys)]))
    result.loss_sum.backward()
    assert result.loss_sum == 0 and result.count == 0
    assert key_KD.grad is not None and key_KD.grad.shape == key_KD.shape and (key_KD.grad == 0).all()
    assert query_RD.grad is not None and all(value == 0 for value in result.stats.values())


@BOTH
def test_row_whose_negatives_are_all_masked_has_no_loss(loss: Loss) -> None:
    query_RD, key_KD, *_ = make_batch(2, 2)
    table = ids((0, 0, 0), (0, 1, 1))
    result = loss(query_RD, key_KD, table, table)
    grads = torch.autograd.grad(result.loss_sum, [query_RD, key_KD])
    assert result.loss_sum == 0 and all((grad == 0).all() for grad in grads)
    assert result.stats["negative_rows"] == 0 and result.stats["hardest_neg_sim"] == 0 and result.stats["top1"] == 2


@BOTH
@pytest.mark.parametrize("same_target", MODES)
def test_stats_equal_a_loop_over_rows(loss: Loss, same_target: SameTarget) -> None:
    query_RD, key_KD, q, k, limit_R = make_full_batch(11, 23, 0.15)
    options: dict[str, Any] = {"same_target": same_target, "limit_R": limit_R, "tile_rows": 4, "tile_keys": 9}
    options["temperature"] = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    result = loss(query_RD, key_KD, q, k, **options)
    want = dict.fromkeys(["same_image", "same_target", "false_negatives", "extra_positives", "entries"], 0.0)
    want |= dict.fromkeys(["top1", "pos_sim", "hardest_neg_sim", "negative_rows"], 0.0)
    for i in range(11):
        negatives, positives = [], []
        for j in range(23):
            similarity = (query_RD[i] @ key_KD[j]).item()
            same_text = bool(q.target_hash_N[i] == k.target_hash_N[j])
            want["entries"] += 1
            if q.pair_id_N[i] == k.pair_id_N[j] or (same_text and same_target == "positive"):
                positives.append(similarity)
            elif q.image_id_N[i] == k.image_id_N[j]:
                want["same_image"] += 1
            elif same_text and same_target == "mask":
                want["same_target"] += 1
            elif similarity > limit_R[i]:
                want["false_negatives"] += 1
            else:
                negatives.append(similarity)
        want["extra_positives"] += len(positives) - 1
        want["pos_sim"] += sum(positives) / len(positives)
        want["hardest_neg_sim"] += max(negatives)
        want["top1"] += max(positives) > max(negatives)
        want["negative_rows"] += 1
    assert all(want[name] > 0 for name in want if name != "same_target" or same_target == "mask")
    assert 0 < want["top1"] < 11 and result.count == 11
    assert {name: value.item() for name, value in result.stats.items()} == pytest.approx(want, rel=1e-5)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in result.stats.values())


@BOTH
def test_ids_are_compared_in_all_64_bits(loss: Loss) -> None:
    query_RD, key_KD, *_ = make_batch(3, 3)
    table = ids(*[(i * 2**32, i * 2**33, i * 2**34 - 2**62) for i in range(3)])
    result = loss(query_RD, key_KD, table, table)
    found = {name: result.stats[name].item() for name in ("same_image", "same_target", "extra_positives")}
    assert not any(found.values()) and result.loss_sum.isfinite()


def test_labels_agree_where_the_ids_do_and_nowhere_else() -> None:
    *_, query, key = make_batch(7, 31)
    query_label, key_label = label_ids(query, key)
    for name in vars(query):
        want = getattr(query, name)[:, None] == getattr(key, name)
        labels = getattr(query_label, name), getattr(key_label, name)
        assert torch.equal(labels[0][:, None] == labels[1], want)
        assert all(label.dtype == torch.int32 and label.is_contiguous() and (label >= 0).all() for label in labels)


@pytest.mark.parametrize("same_image", [True, False])
@pytest.mark.parametrize("same_target", MODES)
def test_counts_of_ids_need_no_matrix(same_image: bool, same_target: SameTarget) -> None:
    """Ids drawn column by column: an equal pair id says nothing about the other two."""
    generator = torch.Generator().manual_seed(3)
    for n_rows, n_keys in [(19, 57), (1, 1), (0, 9), (7, 0)]:
        tables = [RowIds(*torch.randint(-1, 5, (3, n), generator=generator)) for n in (n_rows, n_keys)]
        masks = Masks(same_image, same_target)
        positive_RK, excluded_RK = masks.of(*tables)
        image_RK = tables[0].image_id_N[:, None] == tables[1].image_id_N
        n_positive_R, by_image, by_target = masks.count(*label_ids(*tables))
        assert torch.equal(n_positive_R, positive_RK.sum(1))
        assert by_image == (excluded_RK & image_RK).sum() * same_image
        assert by_image + by_target == excluded_RK.sum()


@BOTH
def test_several_positives_are_the_loss_of_supervised_contrastive_learning(loss: Loss) -> None:
    """Khosla et al. (arXiv 2004.11362), eq. 2, as it is written: the mean over positives of -log of a softmax."""
    query_RD, key_KD, q, k, _ = make_full_batch(9, 21, 0.0)
    result = loss(query_RD, key_KD, q, k, temperature=0.2, mask_same_image=False, same_target="positive")
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(9):
        logits_K = key_KD @ query_RD[i] / 0.2
        positive_K = (k.pair_id_N == q.pair_id_N[i]) | (k.target_hash_N == q.target_hash_N[i])
        expected = expected - logits_K.log_softmax(0)[positive_K].mean()
    assert result.stats["extra_positives"] > 5
    wanted = torch.autograd.grad(expected, [query_RD, key_KD])
    found = torch.autograd.grad(result.loss_sum, [query_RD, key_KD])
    torch.testing.assert_close([result.loss_sum, *found], [expected, *wanted], rtol=1e-10, atol=1e-10)


@BOTH
def test_what_is_excluded_for_its_similarity_gets_no_gradient_and_gives_none(loss: Loss) -> None:
    """The limit moves with the row's own positive, but neither positive nor row hears of the key it took out."""
    query_RD, key_KD, q, k, limit_R = make_full_batch(6, 15, 0.1)
    assert not limit_R.requires_grad
    with_limit = loss(query_RD, key_KD, q, k, limit_R=limit_R, mask_same_image=False, same_target="keep")
    assert with_limit.stats["false_negatives"] > 0
    out_RK = (query_RD @ key_KD.T > limit_R[:, None]) & (q.pair_id_N[:, None] != k.pair_id_N)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        left_J = (~out_RK[i]).nonzero()[:, 0]
        row_ids, key_ids = q.rows(i, i + 1), RowIds(*(column[left_J] for column in k.columns()))
        options: dict[str, Any] = {"mask_same_image": False, "same_target": "keep"}
        expected = expected + info_nce_dense(query_RD[i : i + 1], key_KD[left_J], row_ids, key_ids, **options).loss_sum
    wanted = torch.autograd.grad(expected, [query_RD, key_KD])
    found = torch.autograd.grad(with_limit.loss_sum, [query_RD, key_KD])
    torch.testing.assert_close([with_limit.loss_sum, *found], [expected, *wanted], rtol=1e-10, atol=1e-10)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_own_positive_is_never_taken_for_a_false_negative(loss: Loss, dtype: torch.dtype) -> None:
    """Also where the limit, computed on its own, is rounded below the similarity in the matrix."""
    key_KD = F.normalize(torch.randn(64, 96), dim=-1).to(dtype)
    table = RowIds.from_table(torch.arange(64)[:, None].expand(-1, 3).contiguous())
    limit_R = false_negative_limit(key_KD, key_KD, 0.0)
    result = loss(key_KD, key_KD, table, table, limit_R=limit_R - 1e-3)
    assert result.loss_sum.isfinite() and result.stats["false_negatives"] == 0 and result.stats["pos_sim"] > 63


def test_a_tie_with_a_negative_is_not_a_top1() -> None:
    query_RD = torch.tensor([[1.0, 0.0]])
    key_KD = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert info_nce(query_RD, key_KD, ids((0, 0, 0)), ids((0, 0, 0), (1, 1, 1))).stats["top1"] == 0


def test_no_tensor_of_rows_times_keys_is_ever_held() -> None:
    size, dim, tile_rows, tile_keys = 4096, 8, 512, 1024
    query_RD, key_KD, *tables = make_batch(size, size, dim, dtype=torch.float32)
    with LargestTensor() as largest:
        info_nce(query_RD, key_KD, *tables, tile_rows=tile_rows, tile_keys=tile_keys).loss_sum.backward()
    assert query_RD.grad is not None and largest.numel == tile_rows * tile_keys < size * size


@pytest.mark.parametrize("noise", [0.08, 0.16, 0.2])
def test_gradients_of_rows_that_are_nearly_solved_are_not_rounding_noise(noise: float) -> None:
    """Mean losses of 1e-9, 1e-2 and 0.2 at temperature 0.02, in fp32 against fp64."""
    generator = torch.Generator().manual_seed(0)
    key_KD = torch.nn.functional.normalize(torch.randn(512, 64, generator=generator), dim=-1)
    noisy_KD = key_KD + noise * torch.randn(512, 64, generator=generator)
    query_RD = torch.nn.functional.normalize(noisy_KD, dim=-1)
    ids = RowIds.from_table(torch.arange(512)[:, None].expand(-1, 3).contiguous())

    def gradient(loss: Callable[..., InfoNCE], dtype: torch.dtype) -> torch.Tensor:
        rows = query_RD.to(dtype).requires_grad_()
        loss(rows, key_KD.to(dtype), ids, ids, temperature=0.02).loss_sum.backward()
        assert rows.grad is not None
        return rows.grad.double()

    exact, found = gradient(info_nce_dense, torch.float64), gradient(info_nce, torch.float32)
    by_row = (found - exact).norm(dim=1) / exact.norm(dim=1)
    assert (found - exact).norm() / exact.norm() < 1e-5 and by_row.median() < 1e-4


def test_gradients_of_nearly_solved_rows_with_several_equal_positives_are_not_rounding_noise() -> None:
    """The same target text three times, embedded alike: the positives' shares of the softmax are equal to the bit."""
    generator = torch.Generator().manual_seed(0)
    text_KD = torch.nn.functional.normalize(torch.randn(64, 48, generator=generator), dim=-1)
    query_RD = torch.nn.functional.normalize(text_KD + 0.08 * torch.randn(64, 48, generator=generator), dim=-1)
    query_ids, key_ids = (RowIds.from_table(torch.arange(64).repeat(n)[:, None].expand(-1, 3)) for n in (1, 3))

    def gradient(loss: Loss, dtype: torch.dtype) -> torch.Tensor:
        rows, keys = query_RD.to(dtype).requires_grad_(), text_KD.repeat(3, 1).to(dtype)
        loss(rows, keys, query_ids, key_ids, temperature=0.02, mask_same_image=False).loss_sum.backward()
        assert rows.grad is not None
        return rows.grad.double()

    exact, found = gradient(info_nce_dense, torch.float64), gradient(info_nce, torch.float32)
    assert exact.norm() < 1e-2
    assert (found - exact).norm() / exact.norm() < 1e-4
