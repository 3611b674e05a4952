"""What clients may send, apart from messages (`schemas_chat.py`) and what is refused (`unsupported.py`).

Types are strict: "3" and true are no integers, 3 is a fine float. null means "not given" everywhere. Fields that are
not declared are kept as extras, for `unsupported.check`. Bounds that an operator may move are in `Settings`
and are checked by `convert.py`.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from server.reasoning.schemas import BudgetFields
from server.schemas_diffusion import Diffusion
from server.schemas_sampling import MAX_INTERVAL, Alternatives, PromptCut, StopFields
from server.schemas_structured import StructuredFields

MAX_LOGPROB_IDS = 128
MAX_LISTED = 1024  # entries of logit_bias, bad_words, stop_token_ids
MAX_STOP_CHARS = 1024
MAX_DRAFT = 1024  # that a request may name

T = TypeVar("T")
List = Annotated[list[T], Field(fail_fast=True)]


def default(value: T | None, otherwise: T) -> T:
    """null is the same as not given."""
    return otherwise if value is None else value


def _check_bias(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LISTED:
        raise PydanticCustomError("value_error", f"at most {MAX_LISTED} tokens may be biased")
    return value


def _check_prompt(value: object) -> object:
    """A string, token ids, or a list of one of them. Looks no further than the first element that is wrong."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        kind = type(value[0])
        if kind in (str, int) and set(map(type, value)) == {kind}:
            return value
        if kind is list and all(type(item) is list and set(map(type, item)) <= {int} for item in value):
            return value
    if value in ("", []):
        raise PydanticCustomError("value_error", "the prompt is empty")
    raise PydanticCustomError(
        "prompt_type", "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
    )


def _check_stop(value: object) -> list[str] | None:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError("value_error", f"stop strings must have 1 to {MAX_STOP_CHARS} characters")
    return stops


Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[int], Field(fail_fast=True, max_length=MAX_LISTED)]
PromptInput = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(_check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
StopInput = Annotated[list[str] | None, PlainValidator(_check_stop, json_schema_input_type=str | list[str] | None)]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_check_bias, json_schema_input_type=dict[str, float]),
]
BadWords = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], Field(fail_fast=True, max_length=MAX_LISTED)
]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: str | None = Field(None, description="Default: the first model that the server has.")

    def extras(self) -> dict[str, object]:
        """Fields that were sent, are not null and not declared here."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


def _bounds(low: float, high: float) -> FieldInfo:
    """Bounds to be read. The engine checks them, and to which verifier a knob belongs, by the verifiers themselves."""
    found: FieldInfo = Field(json_schema_extra={"minimum": low, "maximum": high})
    return found


Share = Annotated[float, _bounds(0, 1)]
UpTo100 = Annotated[float, _bounds(0, 100)]
# The knobs of the verifiers, by their names in `Speculation`.
KNOBS = (
    *("target_weight", "min_weight", "epsilon", "lenience", "posterior_threshold", "posterior_alpha"),
    *("relaxed_topk", "relaxed_delta"),
)


class Speculation(BaseModel):
    """How to draft for this request. Under a lossless verifier it changes the speed of the answer, never its law."""

    # What else is sent is refused by `speculation_params`, which knows what to say of it; null stays "not given".
    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )

    enabled: bool | None = Field(
        None,
        description="false: decode plainly. Default: true where the model is served with a drafter; without one,"
        " true is an error.",
    )
    max_draft: Annotated[int, Field(ge=0, le=MAX_DRAFT)] | None = Field(
        None,
        description="Most tokens to draft in one round; 0 is off. The server's own bound holds too, and is the"
        " default. Without a drafter, anything above 0 is an error.",
    )
    report: bool | None = Field(
        None,
        description="Put an object `speculation` into the answer: verifier, knobs, lossy, decoder, rounds, drafted,"
        " accepted, histogram, bias and bias_bound. An answer that may leave the model's own law always has it.",
    )
    trace: bool | None = Field(
        None,
        description="Put an object `speculation` into each choice (of each chunk), with a letter for each token in"
        " `origins`: d drafted, c corrected, b bonus, p plain; and where its text starts in `offsets`.",
    )
    verifier: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Which drafted tokens stand: a name that the model's entry in /v1/models lists, with its knobs."
        " Default: the server's.",
    )
    target_weight: Share | None = Field(
        None,
        description="Of `ensemble`: how much the model's law counts in the mixture with the draft's. 1 is lossless.",
    )
    min_weight: Share | None = Field(
        None, description="Of `diversed`: the least that its head may let the model's law count. 1 is lossless."
    )
    epsilon: Share | None = Field(
        None, description="Of `bounded`: most that a token's law may move, in total variation. 0 is lossless."
    )
    lenience: Annotated[float, _bounds(0.01, 1)] | None = Field(
        None,
        description="Of `lenient`: a drafted token counts as if the model liked it 1 / lenience times as much."
        " 1 is lossless.",
    )
    posterior_threshold: Share | None = Field(
        None, description="Of `typical`: a drafted token stands that the model gives more than this."
    )
    posterior_alpha: UpTo100 | None = Field(
        None, description="Of `typical`: or more than this times exp(-entropy of the model's law)."
    )
    relaxed_topk: Annotated[int, _bounds(1, 1000)] | None = Field(
        None, description="Of `top_k_gap`: a drafted token that is among so many of the model's likeliest may stand."
    )
    relaxed_delta: UpTo100 | None = Field(
        None, description="Of `top_k_gap`: it stands if its log-probability is no further than this below the best one."
    )
    sample: bool | None = Field(
        None,
        description="Draw the drafts from the draft's law, for verifiers that weigh laws, in place of its likeliest"
        " tokens; without temperature nothing is drawn. Default: the server's.",
    )
    thinking_only: bool | None = Field(
        None,
        description="Let the verifier leave the model's law only inside its thinking span. Default: false. An error"
        " where the model's tokenizer has no tokens around one.",
    )


RequestId = Annotated[
    str,
    Field(
        max_length=128,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$",
        description="Part of the answer's id in place of random letters; 409 while a request of that id runs.",
    ),
]


class SamplingBody(StopFields, PromptCut, BudgetFields, Body):
    """How an answer is made: the parameters of every endpoint that writes one."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1, description="-1 and 0 turn it off.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopInput = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: List[int] | None = None
    bad_words: BadWords | None = None
    stream: bool | None = None
    add_special_tokens: bool | None = None
    request_id: RequestId | None = None
    priority: Int32 | None = Field(None, description="Lower runs first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    speculation: Speculation | None = None
    diffusion: Diffusion | None = None


class GenerationBody(StructuredFields, SamplingBody):
    """The parameters that the two OpenAI endpoints with choices share."""

    n: Int32 | None = None
    max_tokens: Int32 | None = None
    prompt_logprobs: Alternatives | None = None
    logprob_token_ids: Annotated[list[Count], Field(fail_fast=True, max_length=MAX_LOGPROB_IDS)] | None = Field(
        None,
        description="Tokens whose log-probabilities stand beside each generated token's, in place of the likeliest"
        " ones; needs logprobs.",
    )
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream_interval: Annotated[int, Field(ge=1, le=MAX_INTERVAL)] | None = Field(
        None, description="Tokens of a choice that a stream's chunk holds at least, but for the first and the last."
    )


class CompletionBody(GenerationBody):
    prompt: PromptInput
    echo: bool | None = None
    logprobs: Alternatives | None = None


class DetokenizeBody(Body):
    tokens: List[int]
