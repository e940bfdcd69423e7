"""Steps to plan: of equal blocks, which are worked by hand, and of blocks that differ."""

from __future__ import annotations

from hypothesis import strategies as st

from assay.systems.offload import BlockProfile, Link, Piece, Profile


def profile(
    blocks: int = 3,
    saved: int = 90,
    given_bytes: int = 10,
    forward_ms: float = 9.0,
    backward_ms: float = 18.0,
    bytes_per_ms: float = 10.0,
    parts: int = 1,
) -> Profile:
    """Equal blocks that save their input as they begin and the rest, in parts, as they go."""
    pieces = []
    for k in range(blocks):
        pieces.append(
            Piece(
                block=k,
                nbytes=given_bytes,
                movable_bytes=given_bytes,
                before_ms=0,
                after_ms=0,
                is_input=True,
            )
        )
        share = (saved - given_bytes) // parts
        pieces += [
            Piece(
                block=k, nbytes=share, movable_bytes=share,
                before_ms=forward_ms / parts, after_ms=backward_ms / parts,
            )
        ] * parts  # fmt: skip
    block = BlockProfile(
        forward_ms=forward_ms, backward_ms=backward_ms, saved_bytes=saved, movable_bytes=saved,
        input_bytes=given_bytes, input_movable_bytes=given_bytes,
    )  # fmt: skip
    link = Link(out_bytes_per_s=bytes_per_ms * 1e3, back_bytes_per_s=bytes_per_ms * 1e3)
    return Profile(blocks=(block,) * blocks, pieces=tuple(pieces), turn_ms=0.0, link=link)


blocks_of_any_kind = st.lists(
    st.tuples(
        st.integers(0, 60),  # input
        st.lists(
            st.tuples(st.integers(1, 300), st.booleans(), st.floats(0, 5), st.floats(0, 10)), max_size=3
        ),
        st.booleans(),
        st.integers(0, 40),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def drawn(blocks: list[tuple[int, list[tuple[int, bool, float, float]], bool, int]], rate: float) -> Profile:
    """A step whose blocks differ."""
    pieces = [Piece(block=None, nbytes=7, movable_bytes=0, before_ms=1.0, after_ms=1.0)]
    costs = []
    for block, (given_bytes, rest, movable, others) in enumerate(blocks):
        own = [
            Piece(
                block=block, nbytes=given_bytes, movable_bytes=given_bytes * movable,
                before_ms=0.5, after_ms=0.5, forward_bytes=others // 2, backward_bytes=others, is_input=True,
            )
        ]  # fmt: skip
        for nbytes, leaves, before_ms, after_ms in rest:
            own.append(
                Piece(
                    block=block, nbytes=nbytes, movable_bytes=nbytes * leaves,
                    before_ms=before_ms, after_ms=after_ms, backward_bytes=others,
                )
            )  # fmt: skip
        pieces += own
        costs.append(
            BlockProfile(
                forward_ms=sum(piece.before_ms for piece in own),
                backward_ms=sum(piece.after_ms for piece in own),
                saved_bytes=sum(piece.nbytes for piece in own),
                movable_bytes=sum(piece.movable_bytes for piece in own),
                input_bytes=given_bytes, input_movable_bytes=given_bytes * movable,
            )
        )  # fmt: skip
    link = Link(out_bytes_per_s=rate * 1e3, back_bytes_per_s=rate * 1e3)
    return Profile(blocks=tuple(costs), pieces=tuple(pieces), turn_ms=0.5, link=link)
