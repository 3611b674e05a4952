"""One file per resource; this list is all that the application knows of them."""

from __future__ import annotations

from fastapi import APIRouter

from server.routes import (
    admin,
    chat,
    completions,
    decisions,
    embeddings,
    messages,
    models,
    ops,
    playground,
    responses,
    tokenize,
)

ROUTERS: tuple[APIRouter, ...] = (
    chat.router,
    completions.router,
    responses.router,
    messages.router,
    embeddings.router,
    decisions.router,
    models.router,
    tokenize.router,
    ops.router,
    playground.router,
)
# Only where the settings hold an admin key.
ADMIN_ROUTERS: tuple[APIRouter, ...] = (admin.router,)
