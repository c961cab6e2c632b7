"""The learner: grants prompts, takes scored groups, trains, publishes weights. Flow: docs/architecture.md."""
