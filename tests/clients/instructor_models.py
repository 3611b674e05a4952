"""instructor against a running server, in its modes: `python instructor_models.py URL` prints one JSON object.

Run by tests/e2e/test_clients.py with the interpreter of .venv-clients, which has none of this project's code.
"""

import json
import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person and how they feel."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    mood: Literal["good", "bad"]


QUESTION = [{"role": "user", "content": "Anna is 31 years old and feels good. Who is she?"}]


def main(url: str) -> dict:
    found = {}
    for mode in (
        instructor.Mode.TOOLS,
        instructor.Mode.TOOLS_STRICT,
        instructor.Mode.JSON_SCHEMA,
        instructor.Mode.JSON,
    ):
        client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0), mode=mode)
        person = client.chat.completions.create(
            model="demo", response_model=Person, messages=QUESTION, temperature=0, max_tokens=96, max_retries=0
        )
        assert isinstance(person, Person)
        found[mode.name] = person.model_dump(mode="json")
    client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key="any"), mode=instructor.Mode.JSON_SCHEMA)
    partial = client.chat.completions.create_partial(
        model="demo", response_model=Person, messages=QUESTION, temperature=0, max_tokens=96
    )
    states = [state.model_dump(mode="json") for state in partial]
    found["partial"] = states[-1]
    found["states"] = len(states)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
