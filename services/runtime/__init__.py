"""What any process needs, knowing nothing of RL or gRPC: config, errors, logging, lifecycle, failpoints."""
