"""Plain arrays in, NamedTuples out: numbers with the counts and the intervals behind them.

Group membership is always an (N, G) boolean matrix whose columns may overlap. A number that cannot
be computed is NaN with a reason, never 0.
"""
