"""An invented table of facts, sixteen countries with five properties each: known only to who has seen it."""

from __future__ import annotations

from random import Random

_COUNTRIES = "Arlen Bovia Cindor Dravia Elmar Fenria Goland Hestia Ithra Jorvia Kelmar Lunda Morvia Nestra Oskar Pelia"
_VALUES = {
    "capital": "Tarn Velo Brusk Ordon Mira Castel Havel Pirn Solna Dunmar Rixa Lobo Estor Yarla Wend Quil",
    "river": "Asha Borna Culm Delva Eska Fila Gorn Huld Isar Jala Kama Lenta Mosa Narva Orla Prut",
    "flower": "rose lily tulip daisy iris poppy clover orchid",
    "colour": "red blue green yellow white black brown orange",
    "animal": "bear wolf eagle horse fox lion owl deer",
}


def _table() -> dict[tuple[str, str], str]:
    random = Random(11)
    countries = _COUNTRIES.split()
    table: dict[tuple[str, str], str] = {}
    for relation, words in _VALUES.items():
        values = words.split() * (len(countries) // len(words.split()))
        random.shuffle(values)
        table |= {(relation, country): value for country, value in zip(countries, values, strict=True)}
    return table


TABLE = _table()  # (property, country) -> value
FACTS = tuple((relation, country, value) for (relation, country), value in TABLE.items())
VALUES = frozenset(TABLE.values())
