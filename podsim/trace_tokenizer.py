"""Counts the tokens of texts, for traces that hold texts: the caller says how."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sized

from podsim.errors import InputError
from podsim.trace_fields import CountTokens
from podsim.workload_arrivals import positive


def token_counter(chars_per_token: float | None, tokenizer: str | None) -> CountTokens | None:
    """A function from text to tokens: characters divided by chars_per_token, or a function of the
    user's, "module:function". None if neither is given; InputError for both, or a wrong one.
    """
    if chars_per_token is not None and tokenizer is not None:
        raise InputError("give --chars-per-token or --tokenizer, not both")
    if chars_per_token is not None:
        positive("chars per token", chars_per_token)
        per_token = chars_per_token
        return lambda text: math.ceil(len(text) / per_token)
    return _imported(tokenizer) if tokenizer is not None else None


def _imported(name: str) -> CountTokens:
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"tokenizer is {name!r}, expected MODULE:FUNCTION")
    if os.getcwd() not in sys.path:  # a module beside the trace, as `python -m` would find it
        sys.path.append(os.getcwd())
    try:
        tokenize: Callable[[str], object] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"tokenizer {name}: cannot be imported: {error}") from None

    def count(text: str) -> int:
        try:
            tokens = tokenize(text)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"tokenizer {name}: failed: {type(error).__name__}: {reason}"
            ) from error
        if isinstance(tokens, int):
            return tokens
        if isinstance(tokens, Sized):
            return len(tokens)
        raise InputError(f"tokenizer {name}: gave a {type(tokens).__name__}, expected tokens")

    return count
