"""The paper's ladder and the programs people use, on one machine, under one cap, in one interleaved run.

`contenders` who there is; `lineup` who can run; `contest` one run; `series` all of them; `figures` and `quality` what
came of it; `markdown` and `plot` how it is shown. `ours` and `peers` are what runs in the processes measured.
"""
