"""Errors in the client's words, for endpoints that turn their bodies into a chat and share all its checks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from engine.errors import InvalidRequest
from server.errors import ApiError, to_api_error

T = TypeVar("T", bound=BaseModel)
Rule = tuple[str, str]  # a pattern of how a chat's name begins, and what stands there in the client's


class Names:
    """From the names of a chat's fields to those that the client has used.

    `messages` says of each message where it stood; `rules` are tried in order, the first that fits is taken.
    """

    def __init__(self, messages: str, origins: Sequence[str], rules: Sequence[Rule]) -> None:
        self._messages = messages
        self._origins = origins
        self._rules = [(re.compile(rf"{pattern}(?=[.\[]|$)"), ours) for pattern, ours in rules]

    def of(self, name: str) -> str:
        found = re.match(r"messages\[(\d+)\]", name)
        if found and int(found[1]) < len(self._origins):
            rest = name[found.end() :].replace(".tool_call_id", ".call_id")
            own = self._origins[int(found[1])]
            return own + (rest if own.endswith("]") and rest in (".content", ".role", ".call_id") else "")
        if found or name == "messages":
            return self._messages
        for pattern, ours in self._rules:
            if found := pattern.match(name):
                return found.expand(ours) + name[found.end() :]
        return name

    @contextmanager
    def told(self) -> Iterator[None]:
        """Errors that the inside raises about a request get the client's names."""
        try:
            yield
        except ValidationError as error:
            raise self._renamed(to_api_error(RequestValidationError(error.errors()))) from error
        except (ApiError, InvalidRequest) as error:
            raise self._renamed(to_api_error(error)) from error

    def _renamed(self, error: ApiError) -> ApiError:
        if error.param is None or (name := self.of(error.param)) == error.param:
            return error
        quote = "" if re.search(r"[.\[_]", error.param) else "'"  # a name that is no word stands for itself anywhere
        message = str(error.detail).replace(f"{quote}{error.param}{quote}", f"{quote}{name}{quote}")
        return ApiError(error.status_code, message, param=name, code=error.code, headers=error.headers)


def built(kind: type[T], fields: dict[str, object]) -> T:
    """A body of another endpoint. Raises pydantic's ValidationError, which `Names.told` knows."""
    return kind.model_validate({name: value for name, value in fields.items() if value is not None})
