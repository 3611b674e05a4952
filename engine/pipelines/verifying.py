"""What a verify step makes of drafted tokens: which of them stand, which are masked again, which are replaced.

DualDiffusion's verification functions (arXiv 2604.05250, the authors' code), by the name in `VERIFIES`: trust takes
everything; exact takes back what the verifier itself would not have drawn; confidence what it gives less than the
threshold; both takes back what either does. masked_copy is both, asked of a copy that does not see the token (in the
manner of WINO, arXiv 2507.18578). Pure functions of numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.runtime.batch import SeqInput, TreeRows


@dataclass(frozen=True, slots=True)
class Opinion:
    """What the verifier says of a drafted token: it draws `own` there, and gives that and the `drafted` one so much."""

    position: int
    drafted: int
    own: int
    chance: float  # of `own`
    kept: float  # of `drafted`


@dataclass(frozen=True, slots=True)
class Judgement:
    """Positions by their fate: tokens that stand, that are masked again, that give way to the verifier's own."""

    stands: tuple[int, ...]
    masked: tuple[int, ...]
    replaced: tuple[int, ...]


def rejects(verify: str, threshold: float, opinion: Opinion) -> bool:
    """Does the token give way under this rule? A probability of exactly `threshold` is enough to stay."""
    differs = verify in ("exact", "both", "masked_copy") and opinion.own != opinion.drafted
    return differs or (verify in ("confidence", "both", "masked_copy") and opinion.kept < threshold)


def judge(
    verify: str, threshold: float, opinions: Sequence[Opinion], *, progress: bool, never_again: Collection[int] = ()
) -> Judgement:
    """The fate of all drafted tokens, in order. At least one token is final after each verify step.

    `progress`: the same step makes other tokens final. If not, and nothing stands, the rejected position of which the
    verifier is surest is given its own token, the lowest on ties. `never_again`: positions that the drafter can't
    predict a second time; rejected ones are given the verifier's own token, too.
    """
    rejected = [opinion for opinion in opinions if rejects(verify, threshold, opinion)]
    gone = {opinion.position for opinion in rejected}
    stands = tuple(opinion.position for opinion in opinions if opinion.position not in gone)
    replaced = [opinion.position for opinion in rejected if opinion.position in never_again]
    if rejected and not (progress or stands or replaced):
        replaced = [max(rejected, key=lambda opinion: (opinion.chance, -opinion.position)).position]
    masked = tuple(opinion.position for opinion in rejected if opinion.position not in replaced)
    return Judgement(stands, masked, tuple(replaced))


@dataclass(frozen=True, slots=True)
class Copies:
    """A whole canvas and masked copies of some of its positions, fed in one pass.

    `rows` are those of the canvas' positions, in order; the copies' rows follow after all of them.
    """

    input: SeqInput
    rows: tuple[int, ...]


def with_copies(
    ids: Sequence[int], drafted: Sequence[int], mask_id: int, block_ids: Sequence[int], block_size: int
) -> Copies:
    """For a pass in mode TREE: the canvas `ids`, then a masked copy of each of the `drafted` positions.

    A row of the canvas sees the canvas. A copy sees the canvas but for the token that it is a copy of, and itself, in
    the places behind the canvas' end; so nothing that the canvas' rows make depends on the copies. The pages of the
    drafted positions come last, so that the masks that leave one of them out are short.
    """
    end, held = len(ids), {position // block_size for position in drafted}
    full, pages = end // block_size, -(-end // block_size)
    first = [page for page in range(full) if page not in held]
    order = [*first, *(page for page in range(pages) if page >= full or page in held)]
    positions = [at for page in order for at in range(page * block_size, min((page + 1) * block_size, end))]
    rows = tuple(sorted(range(end), key=positions.__getitem__))
    root = len(first) * block_size
    canvas = (1 << (end - root)) - 1
    copies = [canvas & ~(1 << (rows[at] - root)) | 1 << (end - root + i) for i, at in enumerate(drafted)]
    tree = TreeRows(root, [*positions, *drafted], [*[canvas] * end, *copies])
    fed = [*(ids[at] for at in positions), *[mask_id] * len(drafted)]
    table = [*(block_ids[page] for page in order), *block_ids[pages:]]
    return Copies(SeqInput(fed, 0, table, len(fed), tree), rows)
