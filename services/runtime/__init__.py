"""What any process needs and what knows nothing of RL or gRPC: config, errors, logging, metrics, lifecycle, failpoints."""
