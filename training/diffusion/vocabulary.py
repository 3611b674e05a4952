"""The tokenizer of a small diffusion model: byte-level BPE in which every digit is a token of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.errors import ConfigError

END, TURN, TURN_END, MASK = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PIECES = r"\d| ?[A-Za-z]+|[^A-Za-z\d]+"  # a digit, a word with the space before it, what stands between


def train(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of `size` ids, 260 at least: the special tokens are 0 to 3, and any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, longest: int) -> None:
    """tokenizer.json and tokenizer_config.json with the chat template; `longest` sequence in tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END,
        "mask_token": MASK,
        "additional_special_tokens": [TURN, TURN_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def token(tokenizer: Tokenizer, text: str) -> int:
    """Id of a special token. Raises ConfigError where the tokenizer has none."""
    found = tokenizer.token_to_id(text)
    if found is None:
        raise ConfigError(f"the tokenizer has no token {text}")
    return found


def chat(prompt: str) -> str:
    """What the chat template makes of one user turn."""
    return f"{TURN}user\n{prompt}{TURN_END}\n{TURN}assistant\n"
