"""langchain-openai against a running server: `python langchain_chat.py URL` prints what came back as one JSON object.

Run by tests/e2e/test_clients.py with the interpreter of .venv-clients, which has none of this project's code.
"""

import json
import sys

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class City(BaseModel):
    """A city and where it lies."""

    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}."


def main(url: str) -> dict:
    common = {"base_url": f"{url}/v1", "api_key": "any", "model": "demo", "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(**common, max_tokens=64)
    question = [("human", "What is the capital of France?")]
    whole = chat.invoke(question)
    pieces = list(chat.stream(question, stream_usage=True))
    joined = pieces[0]
    for piece in pieces[1:]:
        joined += piece
    forced = chat.bind_tools([get_weather], tool_choice="get_weather", strict=True)
    asked = [HumanMessage("What is the weather in Paris?")]
    call = forced.invoke(asked)
    streamed = None
    for piece in forced.stream(asked):
        streamed = piece if streamed is None else streamed + piece
    result = get_weather.invoke(call.tool_calls[0])
    assert isinstance(call, AIMessage) and isinstance(result, ToolMessage)
    answer = chat.invoke([*asked, call, result])
    return {
        "whole": whole.content,
        "usage": whole.usage_metadata,
        "finish": whole.response_metadata["finish_reason"],
        "streamed": joined.content,
        "stream_usage": joined.usage_metadata,
        "pieces": len(pieces),
        "call": call.tool_calls,
        "streamed_call": streamed.tool_calls,
        "result": result.content,
        "answer": answer.content,
        "json_schema": chat.with_structured_output(City, method="json_schema").invoke("Tell me of Rome.").model_dump(),
        "functions": chat.with_structured_output(City, method="function_calling").invoke("Of Rome?").model_dump(),
        "json_mode": chat.with_structured_output(City.model_json_schema(), method="json_schema").invoke("Of Oslo."),
        "batch": [message.content for message in chat.batch([question, question])],
        "completion": OpenAI(**common, max_tokens=8).invoke("One, two, three,"),
        "embedding": len(
            OpenAIEmbeddings(
                base_url=f"{url}/v1", api_key="any", model="demo", check_embedding_ctx_length=False
            ).embed_query("Hello")
        ),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
