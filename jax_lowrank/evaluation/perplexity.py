"""How well text is predicted: nats a token and perplexity, with an interval over examples."""

from typing import NamedTuple

import numpy as np

from jax_lowrank.evaluation.intervals import Interval, Ratio, ratio


class Perplexity(NamedTuple):
    """nats_per_token is >= 0, 0 is ideal; perplexity is its exponential, 1 is ideal."""

    nats_per_token: Ratio
    perplexity: Interval
    num_tokens: int


def measure(nll, tokens, *, level: float = 0.95, num_resamples: int = 4000) -> Perplexity:
    """From each example's summed -log p in nats (N,) and its number of predicted tokens (N,).

    Every token counts the same; examples are resampled whole, because tokens of one text are not
    independent.
    """
    nll, tokens = np.asarray(nll, np.float64), np.asarray(tokens)
    nats = ratio(nll[None], tokens[None], level=level, num_resamples=num_resamples)
    if tokens.sum() > 0:  # known also where its interval is not
        nats = nats._replace(estimate=float(nll.sum() / tokens.sum()))
    limits = np.exp([nats.estimate, nats.low, nats.high])
    perplexity = Interval(
        *map(float, limits), nats.n, nats.num_clusters, nats.num_missing, nats.reason
    )
    return Perplexity(nats, perplexity, int(tokens.sum()))
