"""Experiments around the method: from a written request to run configs, records and verdicts.

The folders, from the top of the house to its foundation. Each imports only from those below it, and
`tests/test_architecture.py` reads this list:

    cli        the command line, one module per command
    report     from records to one page with tables, pictures and model cards
    study      methods x budgets x tasks x seeds: planned, run, resumed
    search     hyper-parameter search with Optuna around training
    bench      what a training step costs, side by side
    display    progress on a terminal
    training   jobs, the two engines, events, and the record that a run leaves
    lanes      the fast engine: many runs at once on one frozen backbone
    models     pretrained encoders, their target matrices, and what a method adds to them
    data       data sets as token tables, batches and metrics
    design     from a written request or a design file to run configs
    analysis   statistics, comparisons, claims and verdicts over records
    records    what a run leaves on disk
    config     the schema of a run, and how configs are read, composed and checked
    catalog    tasks, encoders and methods as data

`errors`, `files`, `seeds` and `text` are modules next to the folders; of the project they import only each other.
"""

import logging

# bitsandbytes warns at import, in every process, that a kernel for 4-bit layers is missing; nothing here uses one.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
