"""One file per resource; this list is all that the application knows of them."""

from __future__ import annotations

from fastapi import APIRouter

from server.routes import chat, completions, models, ops, tokenize

ROUTERS: tuple[APIRouter, ...] = (
    chat.router,
    completions.router,
    models.router,
    tokenize.router,
    ops.router,
)
