"""Records are frozen dataclasses in all but the price."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import msgspec

from engine.types import Passes, SeqUpdate


def test_a_record_is_compared_hashed_and_copied_by_its_fields() -> None:
    one, same, other = SeqUpdate("a", (1, 2)), SeqUpdate("a", token_ids=(1, 2)), SeqUpdate("a", (1, 3))
    assert one == same and hash(one) == hash(same) and one != other and len({one, same, other}) == 2
    assert replace(one, token_ids=(1, 3)) == other and asdict(other)["token_ids"] == (1, 3)
    assert not hasattr(one, "__dict__")


def test_a_record_crosses_process_borders() -> None:
    update = SeqUpdate("a", (1, 2), passes=Passes(3, positions=5))
    assert msgspec.msgpack.Decoder(SeqUpdate).decode(msgspec.msgpack.encode(update)) == update


def test_passes_add_up_field_by_field() -> None:
    ones = Passes(*range(1, 7))
    assert ones.plus(ones) == Passes(*range(2, 14, 2)) and len(fields(Passes)) == 6
