"""Who a peer is: a role and an id, written as a SPIFFE URI in its certificate.

spiffe://heterorl/sampler/eu-2
"""

import enum
import re
from dataclasses import dataclass

from services.runtime.errors import BadInputError

TRUST_DOMAIN = "heterorl"
_URI = re.compile(rf"spiffe://{TRUST_DOMAIN}/([a-z]+)/([A-Za-z0-9][A-Za-z0-9._-]{{0,63}})")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Role(enum.Enum):
    LEARNER = "learner"
    SAMPLER = "sampler"
    MONITOR = "monitor"
    RELAY = "relay"
    ADMIN = "admin"


SERVING_ROLES = frozenset({Role.LEARNER, Role.RELAY})
"""Roles whose certificate may be shown by a server."""
DIALING_ROLES = frozenset(Role) - {Role.LEARNER}
"""Roles whose certificate may be shown by a client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    role: Role
    id: str

    def __str__(self) -> str:
        return f"{self.role.value} {self.id}"

    @property
    def uri(self) -> str:
        return f"spiffe://{TRUST_DOMAIN}/{self.role.value}/{self.id}"


def parse_uri(uri: str) -> Identity | None:
    """The identity that a SPIFFE URI of ours names; None for any other text."""
    match = _URI.fullmatch(uri)
    if match is None or match[1] not in {role.value for role in Role}:
        return None
    return Identity(role=Role(match[1]), id=match[2])


def require_id(text: str) -> str:
    """`text`, if it can name a peer: it becomes a file name and a metric label. Raises BadInputError."""
    if not _ID.fullmatch(text):
        raise BadInputError(
            f"{text[:80]!r} is no id: letters, digits, dot, dash and underscore, at most 64, a letter or digit first"
        )
    return text
