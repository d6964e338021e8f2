"""Processes that each hold a part of the weights must call them equally often; this is how they agree on how often.

Whoever calls a sharded module waits until all others call it too. Images, masks and the length of names differ from
process to process, so that loops over them ask here for the number of rounds, and fill up with made-up input.
"""

from __future__ import annotations


class Lockstep:
    """A process that holds all weights itself: nobody waits for anybody, and asking costs nothing."""

    together = False
    """Whether calls must be made together."""

    def most(self, count: int) -> int:
        """The largest of the counts that the processes give; all of them must ask."""
        return count


ALONE = Lockstep()
