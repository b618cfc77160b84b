from collections.abc import Iterable

MAX_TOKEN_BYTES: int

def presented_token(metadata: Iterable[tuple[str, str | bytes]]) -> str: ...
