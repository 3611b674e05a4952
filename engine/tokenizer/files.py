"""What a model folder says about its tokens beside tokenizer.json. Unreadable files are a ModelLoadError."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from engine.errors import ModelLoadError
from engine.tokenizer.mask_token import hide_token

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # where nobody says otherwise
_PRIVATE = ("_file", "name_or_path", "auto_map")  # ends of keys that say where files lay when the checkpoint was made
_OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model", "tiktoken.model", "vocab.txt")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """`special`: token texts by name, as templates know them. `templates`: chat templates by name."""

    config: Mapping[str, object]
    special: Mapping[str, str]
    templates: Mapping[str, str]


def load_backend(folder: Path, mask_id: int | None = None) -> tuple[Backend, str | None]:
    """tokenizer.json without the cutting and padding that some files bring along; the text of the mask token.

    Nothing that a text can hold is encoded as `mask_id`.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        found = [name for name in _OTHER_FORMATS if (folder / name).is_file()]
        has = f"only {', '.join(found)}, which are not supported" if found else "no tokenizer at all"
        raise ModelLoadError(
            f"{folder} has no tokenizer.json but {has}; AutoTokenizer of transformers can write one (save_pretrained)"
        )
    mask = None
    try:
        if mask_id is None:
            backend = Backend.from_file(str(path))
        else:
            values, mask = hide_token(path.read_text(encoding="utf-8"), mask_id)
            backend = Backend.from_str(values)
    except Exception as error:  # the library raises bare Exception
        raise ModelLoadError(f"{path} can't be read: {str(error)[:300]}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend, mask


def read_files(folder: Path) -> TokenizerFiles:
    config = read_json(folder / "tokenizer_config.json")
    legacy = read_json(folder / "special_tokens_map.json")
    special = {}
    for name in TOKEN_NAMES:
        token = _token_text(config.get(name)) or _token_text(legacy.get(name))
        if token is not None:
            special[name] = token
    return TokenizerFiles(config, special, _templates(folder, config))


def read_json(path: Path) -> Mapping[str, object]:
    """The mapping in a file; empty if there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} can't be read: {str(error)[:200]}") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object")
    return data


def add_declared_tokens(backend: Backend, files: TokenizerFiles) -> None:
    """Make special what tokenizer_config.json calls special, where tokenizer.json knows it as plain text."""
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    declared = dict.fromkeys(files.special.values())
    listed = files.config.get("added_tokens_decoder")
    for entry in listed.values() if isinstance(listed, dict) else ():
        if isinstance(entry, dict) and entry.get("special") and (text := _token_text(entry)) is not None:
            declared[text] = None
    missing = [text for text in declared if text not in known and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def set_post_processor(backend: Backend, files: TokenizerFiles) -> None:
    """An explicit add_bos_token or add_eos_token decides over tokenizer.json, as in transformers."""
    if not {"add_bos_token", "add_eos_token"} & set(files.config):
        return
    wanted = [("add_bos_token", "bos_token", True), ("add_eos_token", "eos_token", False)]
    pieces, special = ["$A"], []
    for flag, name, first in wanted:
        token = files.special.get(name)
        token_id = None if token is None else backend.token_to_id(token)
        if files.config.get(flag) is True and token is not None and token_id is not None:
            pieces = [token, *pieces] if first else [*pieces, token]
            special.append((token, token_id))
    pair = [*pieces, *("$B" if piece == "$A" else piece for piece in pieces)]
    backend.post_processor = processors.TemplateProcessing(
        single=pieces, pair=pair, special_tokens=list(dict.fromkeys(special))
    )


def read_eos_ids(folder: Path, backend: Backend, files: TokenizerFiles) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json, else config.json, else the tokenizer's eos_token."""
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name)
        nested = config.get("text_config")
        value = config.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None)
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            return tuple(dict.fromkeys(ids))
    token_id = backend.token_to_id(files.special.get("eos_token", ""))
    return () if token_id is None else (token_id,)


def published(files: TokenizerFiles) -> dict[str, object]:
    """tokenizer_config.json without the names of files and folders; tokens are their texts, and the templates are there
    wherever they came from."""
    config = {name: _plain(value) for name, value in files.config.items() if not name.endswith(_PRIVATE)}
    if files.templates:
        named = [{"name": name, "template": source} for name, source in files.templates.items()]
        config["chat_template"] = files.templates["default"] if list(files.templates) == ["default"] else named
    return config


def _plain(value: object) -> object:
    if isinstance(value, dict):
        text = value.get("content")
        return text if isinstance(text, str) else {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _templates(folder: Path, config: Mapping[str, object]) -> Mapping[str, str]:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers."""
    found: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        found["default"] = value
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str):
            found[entry["name"]] = entry["template"]
    try:
        for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
            found[path.stem] = path.read_text(encoding="utf-8")
        if (path := folder / "chat_template.jinja").is_file():
            found["default"] = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"the chat template of {folder} can't be read: {error}") from error
    return found


def _token_text(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
