"""`check_share`: whether the owner of a key may take another place of those that all keys share."""

from __future__ import annotations

from penstock.serving.errors import HttpError


def check_share(what: str, owner: str, held: int, taken: int, limit: int, *, code: str, retry_after_s: float) -> None:
    """Raise a 429 where no place is left, and where an owner already holds as many as are left for all others.

    A key that is alone may hold half of the places, two keys a third each, and there always is room for another one.
    Without keys ("") there is only the limit. After Choudhury and Hahne, "Dynamic queue length thresholds for
    shared-memory packet switches" (1998), with a factor of 1.
    """
    if taken >= limit:
        text = f"{taken} {what}, this server's limit: wait for one of them to end"
    elif owner and held >= limit - taken:
        text = (
            f"{held} {what} for this key, as many as the server has room for from others: wait for one of them to end"
        )
    else:
        return
    raise HttpError(429, text, code=code, retry_after_s=retry_after_s)
