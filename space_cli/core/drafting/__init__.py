"""What a step proposes: a block, and the candidates in it. Nothing here can change the output: all of it is verified.

`chain` has the paper's drafts, and what every drafter is. The rest builds each block anew to bring most tokens per
second: `guesses` has what masks guess, `ngrams` finds where text went on before, `tree` orders the candidates,
`acceptance` knows what was accepted and what it cost, `strategy` puts them together.
"""

from space_cli.core.drafting.acceptance import AcceptanceStats
from space_cli.core.drafting.chain import ChainDrafter, Drafter, Proposal, Verified
from space_cli.core.drafting.guesses import Bigram
from space_cli.core.drafting.ngrams import NgramIndex
from space_cli.core.drafting.strategy import EVERYTHING, AdaptiveDrafter, Guide, Strategy

__all__ = [
    "EVERYTHING",
    "AcceptanceStats",
    "AdaptiveDrafter",
    "Bigram",
    "ChainDrafter",
    "Drafter",
    "Guide",
    "NgramIndex",
    "Proposal",
    "Strategy",
    "Verified",
]
