"""What both ends must agree on, bit for bit: types, conversion, errors, weight deltas, objects, TLS, channels."""
