"""Products of packed matrices: the C code of every instruction set against its torch twin and against fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.kernels import native_matrix, reference_matrix
from engine.kernels.matrix import PackedMatrix, pack
from engine.kernels.native import Library
from engine.kernels.native_matrix import FORMATS
from tests.numeric.native_kernels import VARIANTS, build

SHAPES = ((1, 1), (33, 31), (70, 100), (96, 64))  # outputs and inputs, whole panels and groups or not
ROWS = (*range(1, 34), 100)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=VARIANTS, scope="module")
def library(request: pytest.FixtureRequest) -> Library:
    return build(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


formats = pytest.mark.parametrize("format", FORMATS)


def multiply(library: Library, matrix: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    return native_matrix.multiply(library, matrix.address, x, matrix.outputs)


def random_matrix(outputs: int, inputs: int, format: str, bias: bool = True) -> PackedMatrix:
    random = torch.Generator().manual_seed(outputs * 1000 + inputs)
    weight = torch.randn(outputs, inputs, generator=random) * 0.1
    return pack(weight, format, torch.randn(outputs, generator=random) if bias else None)


def rows_of(count: int, inputs: int) -> torch.Tensor:
    """Rows of very different sizes."""
    random = torch.Generator().manual_seed(count)
    return torch.randn(count, inputs, generator=random) * torch.logspace(-3, 3, count)[:, None]


def bits(x: torch.Tensor) -> list[list[int]]:
    """So that NaN equals itself and zeros have a sign."""
    return x.contiguous().view(torch.int32).tolist()


@formats
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", (True, False))
def test_equals_twin(library: Library, shape: tuple[int, int], format: str, bias: bool) -> None:
    matrix = random_matrix(*shape, format, bias)
    for count in (0, 1, 5, 12, 13, 40):
        x = rows_of(count, shape[1])
        want = reference_matrix.multiply(matrix, x)
        size = want.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(multiply(library, matrix, x) / size, want / size, rtol=0, atol=2e-6)


@formats
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_bounded_by_the_rounding(library: Library, shape: tuple[int, int], format: str) -> None:
    """Against x times the weights that the matrix says it holds, in fp64: half a step of x for each of its codes."""
    matrix, x = random_matrix(*shape, format, bias=False), rows_of(40, shape[1])
    weight = matrix.unpack().double()
    bound = 2e-6 * (x.double().abs() @ weight.abs().T)
    if format != "fp16":
        _, scales = reference_matrix.round_rows(x, matrix.group)
        steps = scales.double().repeat_interleave(matrix.group, dim=1)[:, : shape[1]]
        bound += 0.5 * steps @ weight.abs().T
    assert ((multiply(library, matrix, x).double() - x.double() @ weight.T).abs() <= bound).all()


@formats
def test_bits_of_a_row_depend_on_it_alone(library: Library, format: str, one_thread: None) -> None:
    """Whatever stands beside it, however many rows there are, and for both numbers of threads."""
    matrix, x = random_matrix(70, 100, format), rows_of(100, 100)
    alone = [bits(multiply(library, matrix, row[None]))[0] for row in x]
    for count in ROWS:
        for first in (0, 100 - count):
            assert bits(multiply(library, matrix, x[first : first + count])) == alone[first : first + count], count
    torch.set_num_threads(2)
    assert bits(multiply(library, matrix, x)) == alone


@formats
def test_bits_are_those_of_every_instruction_set(library: Library, format: str) -> None:
    """So packed files, and answers, do not depend on the machine."""
    matrix, x = random_matrix(70, 100, format), rows_of(17, 100)
    assert bits(multiply(library, matrix, x)) == bits(multiply(build(VARIANTS[-1]), matrix, x))


@formats
def test_long_rows(library: Library, format: str) -> None:
    """More rows than go through the panels at once, and inputs as wide as the demo model's."""
    matrix, x = random_matrix(40, 1536, format), rows_of(300, 1536)
    got, want = multiply(library, matrix, x), reference_matrix.multiply(matrix, x)
    size = want.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(got / size, want / size, rtol=0, atol=3e-6)
    assert bits(got[150:160]) == bits(multiply(library, matrix, x[150:160]))


@formats
def test_rows_may_lie_apart(library: Library, format: str) -> None:
    matrix, wide = random_matrix(33, 31, format), rows_of(9, 80)
    part = wide[:, 7:38]
    assert bits(multiply(library, matrix, part)) == bits(multiply(library, matrix, part.contiguous()))


@pytest.mark.parametrize("format", ("int8", "int4"))
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf"), -float("nan")))
def test_a_bad_row_hurts_itself_alone(library: Library, format: str, bad: float) -> None:
    matrix, x = random_matrix(70, 100, format), rows_of(8, 100)
    clean = multiply(library, matrix, x)
    for place in (0, 45, 99):
        x[3] = rows_of(8, 100)[3]
        x[3, place] = bad
        got = multiply(library, matrix, x)
        assert got[3].isnan().all()
        assert bits(got[[0, 1, 2, 4, 5, 6, 7]]) == bits(clean[[0, 1, 2, 4, 5, 6, 7]])
        assert reference_matrix.multiply(matrix, x)[3].isnan().all()


@formats
def test_rows_of_zeros_and_of_tiny_numbers(library: Library, format: str) -> None:
    """The bias remains, down to subnormal numbers; and at the other end nothing overflows for long."""
    matrix = random_matrix(33, 100, format)
    assert matrix.bias is not None
    x = torch.ones(7, 100) * torch.tensor([0.0, 1e-45, 1e-38, 1e-31, 2e-30, 1e-20, -0.0])[:, None]
    assert torch.equal(multiply(library, matrix, x), matrix.bias.expand(7, 33))
    huge = torch.full((1, 100), 1e33)
    assert multiply(library, matrix, huge).isfinite().all()


@pytest.mark.parametrize("format", ("int8", "int4"))
def test_rounds_to_nearest_even(library: Library, format: str) -> None:
    """A diagonal shows the codes: of a group whose largest number is 127 they are the rounded numbers."""
    largest = 127.0 if format == "int8" else 15.0  # then the weights' own scale is 1
    matrix = pack(torch.eye(64) * largest, format)
    halves = torch.arange(-63.5, 64.0, 1.0).view(2, 64)
    halves[:, ::32] = 127.0
    want = halves.round()
    assert torch.equal(multiply(library, matrix, halves), want * largest)
    assert torch.equal(want[0, 1:4], torch.tensor([-62.0, -62.0, -60.0]))


def test_largest_codes_do_not_overflow(library: Library) -> None:
    """All codes at their ends, where 16 bits for a sum of products would be too few."""
    for sign_of_x in (1.0, -1.0):
        x = torch.full((5, 96), sign_of_x)
        for sign in (1.0, -1.0):
            int8 = pack(torch.full((32, 96), sign), "int8")
            want = torch.full((5, 32), 96.0 * sign * sign_of_x)
            torch.testing.assert_close(multiply(library, int8, x), want, rtol=1e-3, atol=0)
        weight = torch.full((32, 96), 15.0)
        weight[:, ::32] = 0.0
        int4 = pack(weight, "int4")
        want = torch.full((5, 32), (96 - 3) * 15 * sign_of_x)
        torch.testing.assert_close(multiply(library, int4, x), want, rtol=1e-6, atol=0)


def test_stray_shapes_are_refused(library: Library) -> None:
    matrix = random_matrix(33, 31, "int8")
    for x in (torch.zeros(2, 32), torch.zeros(2, 30), torch.zeros(31), torch.zeros(1, 2, 31)):
        with pytest.raises(AssertionError):
            matrix.multiply(x)
