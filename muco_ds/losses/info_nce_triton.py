"""The block functions of ``muco_ds.losses.tiles`` as Triton kernels, for bfloat16 and float32 embeddings on CUDA.

Shape legend: R rows, k keys of one block, D embedding width, S splits of the keys, r and c the rows and keys of one
gradient tile.

*Forward.* ``_scan_kernel`` multiplies tiles of rows and keys, evaluates the masks from the ids and keeps each row's
maximum, sum of exponentials and counts in registers over every S-th tile of keys; only S partial results per row are
stored, S being fixed so that small R still fills the GPU and the order of the sums never changes. It runs once for the
negatives and once for the positives, where it multiplies only the tiles that hold one, which are few: both at once do
not fit the registers. What is counted by ids alone is counted without the matrix.

*Backward.* ``_gradient_kernel`` recomputes the logits and stores dL/ds of a tile of at most ``GRADIENT_TILE`` entries
in the embeddings' dtype (bfloat16: 268 MB, 1.6 % of the float32 logits of 65,536 x 65,536); cuBLAS then adds its two
products to float32 gradients. A product with the tile kept on chip would need a [128, D] accumulator per program, 768
KB at D = 1,536 where a multiprocessor has 256 KB of registers, so D would be split and the logits recomputed for each
part; even unsplit, kernels for each of the two gradients recompute the logits twice: 10 R K D operations for 6 useful
ones, at best 60 % of the matrix rate. With the tile it is 8, at best 75 %. The tile costs 6 bytes of traffic per entry
against 6 D operations of the products that use it, and its shape keeps the traffic of the float32 sums (8 bytes per
entry of the gradients and tile) under a tenth of the products' time.

Nothing is atomic: equal inputs give equal bits.

Precision. Products of bfloat16 are summed in float32 and scaled by 1 / temperature *after* the product: scaled queries
would be rounded to bfloat16 a second time. float32 embeddings are multiplied as three tf32 products, which keeps
float32's accuracy (plain tf32 keeps 10 bits of each factor, no more than float16 embeddings would) on tensor cores,
where exact float32 does not run. The products with dL/ds, which is rounded once to the embeddings' dtype, are cuBLAS's:
for float32 they follow ``torch.set_float32_matmul_precision``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from muco_ds.losses.tiles import Block, RowState, finite, slices

# bfloat16: 128 registers a thread and three stages of 32 KB leave room for two programs on a multiprocessor (one on an
# A100, with 164 KB of shared memory to 228): one's masks and exponentials run under the other's product. With 4 warps,
# or 256 keys, the 128 x 128 logits spill to memory more. The three products of float32 need the registers of one.
BLOCK_R, BLOCK_K = 128, 128
BLOCK_D_BYTES = 128
OPTIONS: dict[torch.dtype, dict[str, int]] = {
    torch.bfloat16: {"num_warps": 8, "num_stages": 3, "maxnreg": 128},
    torch.float32: {"num_warps": 8, "num_stages": 3},
}
# Rows of tiles that run together: 16 of them and as many tiles of keys stay in the L2 cache (13 MB at D = 1,536).
GROUP = 16
SPLITS = 32
GRADIENT_TILE = (8192, 16384)
# Triton's interpreter computes bfloat16 wrongly: there the kernels widen it after loading.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
IMAGE, PAIR, TARGET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # columns of the ids


@triton.jit
def _place(n_row_blocks, n_columns, GROUP: tl.constexpr):
    """(row block, column) of this program: down the rows of a group first, then on to the next column."""
    program = tl.program_id(0)
    first = program // (GROUP * n_columns) * GROUP
    height = tl.minimum(n_row_blocks - first, GROUP)
    within = program % (GROUP * n_columns)
    return first + within % height, within // height


@triton.jit
def _products(
    query_ptr,
    row_block,
    n_rows,
    key_ptr,
    key_block,
    n_keys,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """q . k of a block of rows and a block of keys, float32; those beyond the last repeat the last."""
    # One 64-bit address per block: 64-bit offsets of every load would take the registers that the logits need.
    first_row, first_key = tl.cast(row_block, tl.int64) * BLOCK_R, tl.cast(key_block, tl.int64) * BLOCK_K
    row = tl.minimum(tl.arange(0, BLOCK_R), (n_rows - 1 - first_row).to(tl.int32))
    key_row = tl.minimum(tl.arange(0, BLOCK_K), (n_keys - 1 - first_key).to(tl.int32))
    query_ptr += first_row * DIM
    key_ptr += first_key * DIM
    d = tl.arange(0, BLOCK_D)
    row_offset = row[:, None] * DIM + d[None, :]
    key_offset = key_row[:, None] * DIM + d[None, :]
    product = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for start in range(0, DIM, BLOCK_D):
        if DIM % BLOCK_D == 0:
            query = tl.load(query_ptr + row_offset)
            key = tl.load(key_ptr + key_offset)
        else:
            query = tl.load(query_ptr + row_offset, mask=d[None, :] < DIM - start, other=0.0)
            key = tl.load(key_ptr + key_offset, mask=d[None, :] < DIM - start, other=0.0)
        if INTERPRETED:
            query = query.to(tl.float32)
            key = key.to(tl.float32)
        product = tl.dot(query, tl.trans(key), product, input_precision="tf32x3")
        query_ptr += BLOCK_D
        key_ptr += BLOCK_D
    return product


@triton.jit
def _equal(COLUMN: tl.constexpr, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col):
    """Whose labels agree in a column of the ids; a key beyond the last agrees with no row, labels being >= 0."""
    query_label = tl.load(query_label_ptr + COLUMN * n_rows + row)
    key_label = tl.load(key_label_ptr + COLUMN * n_keys + col, mask=col < n_keys, other=-1)
    return query_label[:, None] == key_label[None, :]


@triton.jit
def _positive(SAME_TARGET: tl.constexpr, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col):
    """Which keys are positives of which rows."""
    positive = _equal(PAIR, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col)
    if SAME_TARGET == "positive":
        positive = positive | _equal(TARGET, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col)
    return positive


@triton.jit
def _by_ids(
    SAME_IMAGE: tl.constexpr, SAME_TARGET: tl.constexpr, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col
):
    """Which keys the ids make no negatives of which rows."""
    found = _positive(SAME_TARGET, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col)
    if SAME_IMAGE:
        found = found | _equal(IMAGE, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col)
    if SAME_TARGET == "mask":
        found = found | _equal(TARGET, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col)
    return found


@triton.jit
def _add_exponentials(highest, total, added, scale_log2):
    """Each row's maximum, and sum of exponentials below it, with a tile more; -inf stands for no entry."""
    together = tl.maximum(highest, tl.max(added, axis=1))
    origin = tl.where(together == float("-inf"), 0.0, together)  # inf - inf is not a number
    exponentials = tl.exp2((added - origin[:, None]) * scale_log2)
    return together, total * tl.exp2((highest - origin) * scale_log2) + tl.sum(exponentials, axis=1)


@triton.jit(do_not_specialize=["n_rows", "n_keys", "n_splits"])
def _scan_kernel(
    query_ptr,
    key_ptr,
    query_label_ptr,
    key_label_ptr,
    scale_ptr,
    limit_ptr,
    stats_ptr,
    n_rows,
    n_keys,
    n_splits,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    SAME_IMAGE: tl.constexpr,
    SAME_TARGET: tl.constexpr,
    LIMITED: tl.constexpr,
    POSITIVES: tl.constexpr,
):
    """Maximum, and sum of exponentials below it, of the positives or of the negatives that count; beside them the
    positives' sum, or the number of entries that are no negatives (where there is a limit)."""
    row_block, split = _place(tl.cdiv(n_rows, BLOCK_R), n_splits, GROUP)
    row_out = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.minimum(row_out, n_rows - 1)  # a row too many is computed and not stored
    scale_log2 = tl.load(scale_ptr) * 1.4426950408889634  # 2^(x log2 e) = e^x
    highest = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    beside = tl.zeros([BLOCK_R], dtype=tl.float32)
    for block in range(split, tl.cdiv(n_keys, BLOCK_K), n_splits):
        col = block * BLOCK_K + tl.arange(0, BLOCK_K)
        if POSITIVES:
            positive = _positive(SAME_TARGET, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col)
            if tl.sum(tl.sum(positive.to(tl.int32), axis=1), axis=0) > 0:
                product = _products(
                    query_ptr, row_block, n_rows, key_ptr, block, n_keys, DIM, BLOCK_R, BLOCK_K, BLOCK_D
                )
                beside += tl.sum(tl.where(positive, product, 0.0), axis=1)
                product = tl.where(positive, product, float("-inf"))
                highest, total = _add_exponentials(highest, total, product, scale_log2)
        else:
            product = _products(query_ptr, row_block, n_rows, key_ptr, block, n_keys, DIM, BLOCK_R, BLOCK_K, BLOCK_D)
            dropped = _by_ids(SAME_IMAGE, SAME_TARGET, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col)
            if LIMITED:
                dropped = dropped | (product > tl.load(limit_ptr + row)[:, None])
            product = tl.where(dropped, float("-inf"), product)
            product += tl.where(col < n_keys, 0.0, float("-inf"))[None, :]
            highest, total = _add_exponentials(highest, total, product, scale_log2)
            if LIMITED:
                # Counted from the -inf: a count of `dropped` keeps it in registers beside the logits, and they spill.
                beside += tl.sum(tl.where(product == float("-inf"), 1.0, 0.0), axis=1)
    out = split.to(tl.int64) * n_rows + row_out
    stat = n_splits.to(tl.int64) * n_rows
    stored = row_out < n_rows
    tl.store(stats_ptr + out, highest, mask=stored)
    tl.store(stats_ptr + stat + out, total, mask=stored)
    tl.store(stats_ptr + 2 * stat + out, beside, mask=stored)


@triton.jit(do_not_specialize=["n_rows", "n_keys"])
def _gradient_kernel(
    query_ptr,
    key_ptr,
    query_label_ptr,
    key_label_ptr,
    scale_ptr,
    limit_ptr,
    lse_ptr,
    centre_ptr,
    slope_ptr,
    offset_ptr,
    upstream_ptr,
    grad_ptr,
    n_rows,
    n_keys,
    stride_grad,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    SAME_IMAGE: tl.constexpr,
    SAME_TARGET: tl.constexpr,
    LIMITED: tl.constexpr,
):
    row_block, block = _place(tl.cdiv(n_rows, BLOCK_R), tl.cdiv(n_keys, BLOCK_K), GROUP)
    row_out = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.minimum(row_out, n_rows - 1)
    col = block * BLOCK_K + tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr)
    product = _products(query_ptr, row_block, n_rows, key_ptr, block, n_keys, DIM, BLOCK_R, BLOCK_K, BLOCK_D)
    upstream = tl.load(upstream_ptr + row) * scale
    positive = _positive(SAME_TARGET, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col)
    origin = tl.where(positive, tl.load(centre_ptr + row)[:, None], tl.load(lse_ptr + row)[:, None])
    grad = tl.exp(product * scale - origin)
    at_positive = (grad - 1.0) * tl.load(slope_ptr + row)[:, None] + tl.load(offset_ptr + row)[:, None]
    if SAME_IMAGE:
        grad = tl.where(_equal(IMAGE, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col), 0.0, grad)
    if SAME_TARGET == "mask":
        grad = tl.where(_equal(TARGET, query_label_ptr, n_rows, row, key_label_ptr, n_keys, col), 0.0, grad)
    if LIMITED:
        grad = tl.where(product > tl.load(limit_ptr + row)[:, None], 0.0, grad)
    grad = tl.where(positive, at_positive, grad) * upstream[:, None]
    out = row_out.to(tl.int64)[:, None] * stride_grad + col[None, :]
    inside = (row_out < n_rows)[:, None] & (col < n_keys)[None, :]
    tl.store(grad_ptr + out, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def _inputs(block: Block) -> list[torch.Tensor]:
    """The arguments that both kernels begin with; labels are int32, one row per column of ids."""
    labels = [ids.columns() for ids in (block.query_ids, block.key_ids)]
    limit_R = block.scale if block.limit_R is None else block.limit_R.contiguous()  # not read where there is none
    return [block.query_RD.contiguous(), block.key_kD.contiguous(), *labels, block.scale, limit_R]


def _options(block: Block) -> dict[str, Any]:
    dtype, dim = block.query_RD.dtype, block.query_RD.shape[1]
    sizes = {"BLOCK_R": BLOCK_R, "BLOCK_K": BLOCK_K, "BLOCK_D": BLOCK_D_BYTES // dtype.itemsize, "GROUP": GROUP}
    masks: dict[str, Any] = {"SAME_IMAGE": block.masks.same_image, "SAME_TARGET": block.masks.same_target}
    masks["LIMITED"] = block.limit_R is not None
    return {"DIM": dim, **sizes, **masks, **OPTIONS[dtype]}


def scan_block(block: Block, state: RowState) -> None:
    """``tiles.scan_block`` by the kernel."""
    n_rows, n_keys = len(block.query_RD), len(block.key_kD)
    if n_rows == 0 or n_keys == 0:
        return
    n_splits = min(SPLITS, triton.cdiv(n_keys, BLOCK_K))
    stats_23SR = block.scale.new_empty(2, 3, n_splits, n_rows)
    inputs, options = _inputs(block), _options(block)
    with torch.cuda.device_of(block.query_RD):  # Triton launches on the current device
        for stats_3SR, positives in zip(stats_23SR, (True, False), strict=True):
            _scan_kernel[(triton.cdiv(n_rows, BLOCK_R) * n_splits,)](
                *inputs, stats_3SR, n_rows, n_keys, n_splits, **options, POSITIVES=positives
            )
    n_dropped_by_ids = state.count(block)
    if block.limit_R is not None:  # the kernel counts the columns beyond the keys as well
        state.false_negatives += stats_23SR[1, 2].long().sum() - n_dropped_by_ids - n_rows * (-n_keys % BLOCK_K)
    highest_2SR, total_2SR = stats_23SR[:, 0] * block.scale, stats_23SR[:, 1]
    (best_R, hardest_R), every_row = highest_2SR.amax(1), slice(None)
    exp_R = (total_2SR[0] * (highest_2SR[0] - finite(best_R)).exp()).sum(0)
    state.add_positives(every_row, stats_23SR[0, 2].sum(0) * block.scale, best_R, exp_R)
    state.add_negatives(every_row, hardest_R, (highest_2SR[1] + total_2SR[1].log()).logsumexp(0))


def add_block_gradients(
    block: Block,
    softmax_4R: torch.Tensor,
    upstream_R: torch.Tensor,
    grad_query_RD: torch.Tensor,
    grad_key_kD: torch.Tensor,
) -> None:
    """``tiles.add_block_gradients``: the kernel for dL/ds of a tile, cuBLAS for its two products."""
    n_rows, n_keys = len(block.query_RD), len(block.key_kD)
    if n_rows == 0 or n_keys == 0:
        return
    tile_rows, tile_keys = min(n_rows, GRADIENT_TILE[0]), min(n_keys, GRADIENT_TILE[1])
    # Rows of whole cache lines: cuBLAS takes slow kernels where rows begin at odd addresses.
    stride = triton.cdiv(tile_keys, 64) * 64
    workspace = block.query_RD.new_empty(tile_rows, stride)
    upstream_R = upstream_R.contiguous()  # the gradient of a sum is one number seen as many
    for row in slices(n_rows, tile_rows):
        for col in slices(n_keys, tile_keys):
            tile = block.rows(row).keys(col)
            height, width = len(tile.query_RD), len(tile.key_kD)
            grad_rc = workspace[:height, :width]
            with torch.cuda.device_of(block.query_RD):
                _gradient_kernel[(triton.cdiv(height, BLOCK_R) * triton.cdiv(width, BLOCK_K),)](
                    *_inputs(tile),
                    *softmax_4R[:, row],
                    upstream_R[row],
                    grad_rc,
                    height,
                    width,
                    stride,
                    **_options(tile),
                )
            _add_product(grad_query_RD[row], grad_rc, tile.key_kD)
            _add_product(grad_key_kD[col], grad_rc.T, tile.query_RD)


def _add_product(sum_ND: torch.Tensor, left: torch.Tensor, right_D: torch.Tensor) -> None:
    """sum += left @ right, in float32 whatever the factors."""
    if left.is_cuda:
        torch.addmm(sum_ND, left, right_D, out_dtype=sum_ND.dtype, out=sum_ND)
    else:  # the kernels in Triton's interpreter: only CUDA has products of one dtype in another
        sum_ND.addmm_(left.to(sum_ND.dtype), right_D.to(sum_ND.dtype))
