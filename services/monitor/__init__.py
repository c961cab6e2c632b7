"""Looking at a run: a gRPC client with a read-only certificate, terminal views, causes in words, and the report."""
