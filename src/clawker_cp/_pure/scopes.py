"""
Whether a token's scope text holds a scope (contract 3.2): split at single spaces, compared exactly.
"""

from __future__ import annotations


def has_scope(text: str, required: str) -> bool:
    """
    Whether `required` is one of the words of `text`; case-sensitive, an empty word is no scope.
    """
    return bool(required) and required in text.split(" ")


def scope_words(text: str) -> frozenset[str]:
    """
    The scopes of a text.
    """
    return frozenset(word for word in text.split(" ") if word)
