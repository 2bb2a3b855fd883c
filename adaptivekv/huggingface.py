"""What transformers has to be told: when to stop, how to pad, and to keep quiet meanwhile."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

CHAT_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")


def prepare(model: Any, tokenizer: Any) -> None:
    """Make generation stop at the end of a chat turn, and batches pad where decoder-only models need it."""
    generation = model.generation_config
    stops = generation.eos_token_id if generation.eos_token_id is not None else model.config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    vocabulary = tokenizer.get_vocab()
    for stop in (tokenizer.eos_token_id, *(vocabulary.get(token) for token in CHAT_END_TOKENS)):
        if stop is not None and stop not in stops:
            stops.append(stop)
    if stops:
        generation.eos_token_id = stops
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "left"
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


def line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' progress bars and advice for a while; downloads from the hub still show theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.suppress(Warning):  # the hub warns where its own environment variable rules
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
