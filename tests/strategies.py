"""Hypothesis strategies for blocks and drafts."""

from hypothesis import strategies as st

from space_cli.core.block import Block


@st.composite
def blocks(draw, *, max_candidates=6, max_masks=4):
    """Chains and trees, with mask groups behind all or some of their slots."""
    count = draw(st.integers(0, max_candidates))
    masks = draw(st.integers(0, max_masks))
    if draw(st.booleans()):
        parents = list(range(count))
    else:
        parents = [draw(st.integers(0, candidate - 1)) for candidate in range(1, count + 1)]
    anchors = None
    if masks and draw(st.booleans()):
        anchors = sorted(draw(st.sets(st.integers(0, count))))
    return Block.tree(parents, masks, anchors=anchors)
