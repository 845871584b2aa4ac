"""`Places`: places that all keys share, of which no key takes those that are left for the others."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.serving.errors import HttpError


@dataclass(frozen=True, slots=True)
class Places:
    """`limit` places. A refusal says `what` takes them and the `remedy`; without `retry_after_s`, not to try again.

    A key that is alone may hold half of the places, two keys a third each, and there always is room for another one.
    Without keys ("") there is only the limit. After Choudhury and Hahne, "Dynamic queue length thresholds for
    shared-memory packet switches" (1998), with a factor of 1.
    """

    what: str
    limit: int
    code: str
    remedy: str = "wait for one of them to end"
    retry_after_s: float = 0

    def check(self, owner: str, held: int, taken: int, wanted: int = 1) -> None:
        """Refuse further places to an owner that holds `held` of the `taken` places. Raises an `HttpError`."""
        if taken + wanted > self.limit:
            text = f"{taken} {self.what}, this server's limit"
            if wanted > 1:
                text = f"{taken} {self.what}, and {wanted} more are beyond this server's limit of {self.limit}"
        elif owner and held + wanted > self.limit - (taken + wanted - 1):
            text = f"{held} {self.what} for this key, as many as the server has room for from others"
        else:
            return
        status = 429 if self.retry_after_s else 400
        raise HttpError(status, f"{text}: {self.remedy}", code=self.code, retry_after_s=self.retry_after_s)
