"""HeteroRL over gRPC: learner, samplers, rewards, relay, monitor and laboratory. See docs/architecture.md."""
