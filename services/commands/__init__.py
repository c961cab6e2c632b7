"""One file per verb of the `heterorl` command. Each gives `add_arguments(parser)` and `run(arguments) -> exit code`,
and imports nothing heavy (torch, transformers, grpc, numpy) at its top: a wrong command line answers at once."""
