"""Text to token ids and back, for one model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from engine.errors import InvalidRequest
from engine.thinking import FORMS
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.files import (
    TOKENIZER_CLASS,
    add_declared_tokens,
    load_backend,
    published,
    read_eos_ids,
    read_files,
    set_post_processor,
)
from engine.tokenizer.pieces import PieceKind, Pieces
from engine.tokenizer.tool_form import tool_form

logger = logging.getLogger(__name__)


class Tokenizer:
    """A model's tokenizer and chat template. Nothing changes after loading: use it from any number of threads."""

    def __init__(
        self,
        backend: Backend,
        eos_ids: tuple[int, ...] = (),
        special: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
        hidden: Mapping[int, str] | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """`hidden`: the text of tokens that no text is encoded as, and that the backend has under another name.

        `details`: what `info` tells beside the special tokens.
        """
        names = special or {}
        # As tokenizer_config.json has it, for clients that tokenize by themselves.
        self.info: Mapping[str, object] = {"tokenizer_class": TOKENIZER_CLASS, **names, **(details or {})}
        self.eos_ids = eos_ids
        self.bos_token = names.get("bos_token")
        self.eos_token = names.get("eos_token")
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.pieces = Pieces(backend, hidden)
        self._hidden = frozenset(hidden or ())
        self._backend = backend
        self._template = template
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token.content: token_id for token_id, token in added.items()}
        marks = (self._marks(form) for form in FORMS)
        # The tokens around a thinking span; None where the model has none.
        self.thinking = next((pair for pair in marks if pair is not None), None)

    @classmethod
    def load(cls, folder: Path, mask_id: int | None = None) -> Tokenizer:
        """Read tokenizer.json and the small files beside it. Raises ModelLoadError.

        `mask_id`: the mask token of a diffusion model. Its text in a prompt or a chat is plain text.
        """
        (backend, mask), files = load_backend(folder, mask_id), read_files(folder)
        add_declared_tokens(backend, files)
        set_post_processor(backend, files)
        template = None
        if files.templates:
            try:
                template = ChatTemplate(files.templates, files.special)
            except ValueError as error:
                logger.warning("the chat template of %s can't be used: %s", folder.name, error)
        hidden = {} if mask_id is None or mask is None else {mask_id: mask}
        return cls(backend, read_eos_ids(folder, backend, files), files.special, template, hidden, published(files))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def added_id(self, text: str) -> int | None:
        """The token that stands for this text and no other, if the vocabulary was given one."""
        return self._added.get(text)

    def template_mentions(self, text: str) -> bool:
        """Does the source of the chat template hold this text, as the name of a variable that it reads?"""
        return self._template is not None and self._template.mentions(text)

    def thinking_form(self, wanted: str) -> tuple[str, tuple[int, int] | None]:
        """The name of the form that an answer's thoughts have, empty where they are not told apart; and its marks.

        `wanted`: such a name, "none" or "auto". Of "none" the marks are those that the vocabulary has.
        """
        if wanted not in ("auto", "none"):
            return wanted, self._marks(wanted)
        if wanted == "auto" and self._template is not None:
            for name, form in FORMS.items():
                marks = self._marks(name)
                if marks is not None or (self.template_mentions(form.begin) and self.template_mentions(form.end)):
                    return name, marks
        return "", self.thinking

    def tool_form(self, wanted: str) -> tuple[str, bool]:
        """In which form tools are called, and whether the chat template tells the model of them; see `tool_form`."""
        template = self._template
        return ("", False) if template is None else tool_form(wanted, template.reads("tools"), template.mentions)

    def _marks(self, name: str) -> tuple[int, int] | None:
        begin, end = self.added_id(FORMS[name].begin), self.added_id(FORMS[name].end)
        return None if begin is None or end is None else (begin, end)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it count as themselves.

        Raises InvalidRequest for text that is no Unicode (lone surrogates).
        """
        return self._encode(text, add_special_tokens, "prompt")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary have no text."""
        if any(not 0 <= i < 1 << 32 for i in ids):
            raise InvalidRequest("A token id is negative or too large.", "tokens")
        if self.pieces.kind is PieceKind.OPAQUE:
            ids = [i for i in ids if i not in self._hidden]
            return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        hidden = self._special if skip_special_tokens else frozenset()
        text = b"".join(self.pieces.of(i) for i in ids if i not in hidden).decode("utf-8", errors="replace")
        return text[1:] if self.pieces.strip and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character; empty for unknown ids."""
        return self.pieces.of(token_id)

    def token_text(self, token_id: int) -> str:
        return self.pieces.of(token_id).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """The prompt text of a chat. `template`: further variables for the model's template.

        Raises InvalidRequest for messages that the template refuses, and where there is no template.
        """
        if self._template is None:
            raise InvalidRequest("This model has no chat template; use /v1/completions instead.", "messages")
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template=template,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        """Token ids of a rendered chat. The template itself writes the beginning-of-sequence token, if there is one."""
        text = self.render_chat(messages, add_generation_prompt, continue_final_message, template, tools)
        return self._encode(text, False, "messages")

    def _encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest("The text holds a lone surrogate (half of a UTF-16 pair).", param) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
