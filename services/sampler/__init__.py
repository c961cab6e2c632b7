"""The sampler: follows the policy, generates, has groups scored, spools them, submits them."""
