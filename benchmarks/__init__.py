"""How fast the fleet is, measured through real processes: ``make bench``, or ``python -m benchmarks.<name>``.

``overhead`` (what the queue costs), ``throughput`` (how much of the model's own speed is left), ``latency`` (under
open load and next to bulk), ``startup``. Each prints a card for people and, as its last line, one JSON object.
``docs/performance.md`` says what each figure means.
"""
