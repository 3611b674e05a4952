"""Drawing tokens on a GPU: noise by Philox4x64-10 (Salmon et al. 2011) as `runtime.rng` makes it, scores and argmax.

The noise of a token is a function of its row's key and its id, so nothing is stored between the generator and the
score. Logarithms are taken in fp64: those of `rng` are fp32, correct to a unit in the last place, and so are these.
"""

import torch
import triton
import triton.language as tl

LANES = tl.constexpr(8)  # 32-bit numbers of one block of Philox
BLOCKS = 256  # of one program


@triton.jit
def _multiply(constant, x):
    """High and low 64 bits of the product."""
    return tl.umulhi(x, constant), x * constant


@triton.jit
def philox(c0, c1, key0, key1):
    """The four 64-bit words of counter (c0, c1, 0, 0): a lane block and a position; purpose TARGET and step are 0."""
    c2 = c0 * 0
    c3 = c0 * 0
    m0 = tl.full(c0.shape, 0xD2E7470EE14C6C93, tl.uint64)
    m1 = tl.full(c0.shape, 0xCA5A826395121157, tl.uint64)
    w0 = tl.full(c0.shape, 0x9E3779B97F4A7C15, tl.uint64)
    w1 = tl.full(c0.shape, 0xBB67AE8584CAA73B, tl.uint64)
    for _ in tl.static_range(10):
        high0, low0 = _multiply(m0, c0)
        high1, low1 = _multiply(m1, c2)
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = key0 + w0
        key1 = key1 + w1
    return c0, c1, c2, c3


@triton.jit
def gumbel(bits):
    """-log(-log(1 - v)) float32 with v = (bits + 0.5) / 2^32, rounded where `rng.gumbel_of_bits` rounds."""
    near = bits.to(tl.float32) * -2.3283064365386963e-10 - 1.1641532182693481e-10
    near = tl.maximum(near, -0.99999994039535522)
    inner = tl.log(1.0 + near.to(tl.float64)).to(tl.float32)
    return (-tl.log((-inner).to(tl.float64))).to(tl.float32)


# fmt: off
@triton.jit(do_not_specialize=["row_stride", "vocabulary", "rows"])
def best_of_chunk(
    logits, largest, keys, positions, temperatures, tops, tokens, row_stride, vocabulary, rows,
    BLOCKS: tl.constexpr,
):
    """The best score of BLOCKS * 8 columns of one row, and the lowest token that has it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperatures + row)
    top = tl.load(largest + row)
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    columns = logits + row.to(tl.int64) * row_stride + block * LANES
    best = tl.full([BLOCKS], float("-inf"), tl.float32)
    token = block * LANES
    if heat > 0.0:
        like = tl.full([BLOCKS], 0, tl.uint64)
        key0 = like + tl.load(keys + row).to(tl.uint64)
        key1 = like + tl.load(keys + rows + row).to(tl.uint64)
        position = like + tl.load(positions + row).to(tl.uint64)
        x0, x1, x2, x3 = philox(block.to(tl.uint64), position, key0, key1)
        for lane in tl.static_range(8):
            if lane < 2:
                word = x0
            elif lane < 4:
                word = x1
            elif lane < 6:
                word = x2
            else:
                word = x3
            bits = (word >> (32 * (lane % 2))) & 0xFFFFFFFF
            inside = block * LANES + lane < vocabulary
            logit = tl.load(columns + lane, mask=inside, other=float("-inf"))
            score = tl.div_rn(logit - top, heat) + gumbel(bits)
            better = inside & (score > best)
            token = tl.where(better, block * LANES + lane, token)
            best = tl.where(better, score, best)
    else:
        for lane in tl.static_range(8):
            inside = block * LANES + lane < vocabulary
            logit = tl.load(columns + lane, mask=inside, other=float("-inf"))
            better = inside & (logit > best)
            token = tl.where(better, block * LANES + lane, token)
            best = tl.where(better, logit, best)
    highest = tl.max(best, 0)
    place = row * tl.num_programs(1) + chunk
    tl.store(tops + place, highest)
    tl.store(tokens + place, tl.min(tl.where(best == highest, token, 0x7FFFFFFF), 0))


@triton.jit(do_not_specialize=["chunks"])
def best_of_row(tops, tokens, largest, out, chunks, CHUNKS: tl.constexpr):
    """The lowest token with the best score of all chunks; -1 where the row's largest logit is no number."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    top = tl.load(tops + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    token = tl.load(tokens + row * chunks + chunk, mask=chunk < chunks, other=0x7FFFFFFF)
    first = tl.min(tl.where(top == tl.max(top, 0), token, 0x7FFFFFFF), 0)
    raw = tl.load(largest + row)
    tl.store(out + row, tl.where(tl.abs(raw) < float("inf"), first, -1).to(tl.int64))
# fmt: on


def draw(logits: torch.Tensor, keys: torch.Tensor, position: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """See `runtime.device_draw.draw`: logits [m, V] float32, rows may lie apart."""
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 and keys.is_contiguous()
    chunks = triton.cdiv(vocabulary, BLOCKS * LANES.value)
    largest = logits.amax(1)
    tops = logits.new_empty(rows, chunks)
    tokens = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    best_of_chunk[(rows, chunks)](
        *(logits, largest, keys, position, temperature, tops, tokens, logits.stride(0), vocabulary, rows),
        BLOCKS=BLOCKS,
    )
    best_of_row[(rows,)](tops, tokens, largest, out, chunks, CHUNKS=triton.next_power_of_2(chunks))
    return out
