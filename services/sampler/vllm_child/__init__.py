"""vLLM in a process of its own, and the parent's side of it, which imports no vLLM.

parent   supervisor (one child at a time) · process (its handle) · staging (weights as files) · arguments
both     messages
child    __main__ (the loop) · generator (vLLM's engine) · worker (new weights, inside vLLM's workers)
"""
