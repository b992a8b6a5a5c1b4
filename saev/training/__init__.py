"""Stage 2: train many sparse autoencoders on one stream of activations.

In reading order: `config` says what is trained. `loop.main` trains and evaluates a group of runs. `run.Run`
is one of them, with its training step; `batches`, `parallel`, `interrupts` and `state` are what both rest on,
and `memory` says what they need. `identity` names runs, `evaluate` measures finished ones, `report` compares
them.
"""
