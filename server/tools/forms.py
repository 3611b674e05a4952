"""The forms by their names in `models.tool_parser`."""

from __future__ import annotations

from collections.abc import Mapping

from server.tools.form import Form
from server.tools.hermes import Hermes
from server.tools.llama3_json import Llama3Json
from server.tools.mistral import Mistral
from server.tools.pythonic import Pythonic

FORMS: Mapping[str, Form] = {
    "hermes": Hermes(),
    "llama3_json": Llama3Json(),
    "mistral": Mistral(),
    "pythonic": Pythonic(),
}
