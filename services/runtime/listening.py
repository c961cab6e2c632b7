"""Why a socket could not be bound, in one sentence."""

import errno

from services.runtime.address import Address
from services.runtime.errors import ConfigError, UnavailableError


def listen_error(address: Address, what: str, error: OSError) -> UnavailableError | ConfigError:
    """The sentence for a socket that could not be bound. `what`: whose it would have been."""
    if error.errno == errno.EADDRINUSE:
        return UnavailableError(
            f"port {address.port} on {address.host} ({what}) is in use by another process: stop it or set another port"
        )
    return ConfigError(f"cannot listen on {address} ({what}): {error.strerror or error}")
