"""WeightService from a disk cache: one copy of each weight object over the wide-area link, however many samplers."""
