"""Between the protocol's dataclasses and the generated messages.

Structure is checked here, meaning at the receiver. `to_*` and `encode_*` never fail. `from_*` and `decode_*` raise
BadInputError with one sentence when bytes do not parse or an enum is unspecified or unknown (an unknown value reads
as unspecified, and is refused).
"""

from services.wire.convert.control import (
    from_engine,
    from_grader,
    from_heartbeat,
    from_lease,
    from_lease_ids,
    from_run_settings,
    from_sampling,
    to_engine,
    to_grader,
    to_heartbeat,
    to_lease,
    to_run_settings,
    to_sampling,
)
from services.wire.convert.rollouts import (
    decode_group,
    encode_group,
    from_envelope,
    from_verdict,
    to_envelope,
    to_verdict,
)
from services.wire.convert.shared import (
    from_object,
    from_objects,
    from_session,
    model_files_sha256,
    to_object,
    to_session,
)
from services.wire.convert.weights import (
    decode_manifest,
    encode_manifest,
    from_announcement,
    from_plan,
    from_signed,
    to_announcement,
    to_plan,
    to_signed,
)

__all__ = [
    "decode_group",
    "decode_manifest",
    "encode_group",
    "encode_manifest",
    "from_announcement",
    "from_engine",
    "from_envelope",
    "from_grader",
    "from_heartbeat",
    "from_lease",
    "from_lease_ids",
    "from_object",
    "from_objects",
    "from_plan",
    "from_run_settings",
    "from_sampling",
    "from_session",
    "from_signed",
    "from_verdict",
    "model_files_sha256",
    "to_announcement",
    "to_engine",
    "to_envelope",
    "to_grader",
    "to_heartbeat",
    "to_lease",
    "to_object",
    "to_plan",
    "to_run_settings",
    "to_sampling",
    "to_session",
    "to_signed",
    "to_verdict",
]
