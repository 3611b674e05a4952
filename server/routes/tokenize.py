"""POST /tokenize and /detokenize, GET /tokenizer_info: in vLLM's shapes, with and without the /v1 prefix."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from server import unsupported
from server.body import GuardedRoute
from server.errors import invalid
from server.prompts import tokenize
from server.schemas import DetokenizeBody
from server.schemas_chat import TokenizeBody
from server.service import service_of

router = APIRouter(route_class=GuardedRoute, tags=["tokens"])


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize_text(body: TokenizeBody, request: Request) -> dict[str, object]:
    """Token ids of a text or of a conversation under the model's template."""
    engine, ids = await tokenize(body, service_of(request))
    strings = [engine.tokenizer.token_text(i) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": engine.info.max_model_len, "tokens": ids, "token_strs": strings}


@router.get("/tokenizer_info")
@router.get("/v1/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, object]:
    """What a client needs to tokenize and to write prompts by itself, in the form of tokenizer_config.json."""
    return dict(service_of(request).engine(model).tokenizer.info)


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, object]:
    """The text of token ids, special tokens included."""
    service = service_of(request)
    engine = service.engine(body.model)
    unsupported.check(body, 1, service.unknown_fields)
    if body.tokens and not 0 <= min(body.tokens) <= max(body.tokens) < engine.info.vocab_size:
        raise invalid("tokens", f"ids must be from 0 to {engine.info.vocab_size - 1}")
    return {"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}
